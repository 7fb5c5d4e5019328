"""The files of a LoRA adapter: what one says of itself, its tensors, and writing them. No model is needed here.

An adapter is a folder: `adapter_model.safetensors` (older ones: `adapter_model.bin`) and `adapter_config.json` are
PEFT's, `chatglm3_run.json` holds the base model's name and the prompt format. Exercise it with
`pytest tests/test_adapters.py`.
"""

import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
RUN_FILE = "chatglm3_run.json"


class AdapterError(ValueError):
    """An adapter that cannot be made, read, or does not fit the model."""


@dataclass(frozen=True)
class AdapterConfig:
    """What an adapter says of itself.

    Args:
        rank: of its matrices.
        target_modules: the modules that it changes.
        is_reward_model: whether it belongs in front of a score head (stage rm).
        base_model: folder or hub name of the model it was trained for; None: unknown.
        prompt_format: the format it was trained with; None: an adapter from elsewhere, which does not say.
        quantization_bit: 4 or 8 where its base was quantized while it was trained; None: it was not, or is unknown.
    """

    rank: int
    target_modules: tuple[str, ...]
    is_reward_model: bool
    base_model: str | None = None
    prompt_format: str | None = None
    quantization_bit: int | None = None


def is_adapter_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter."""
    folder = Path(folder)
    return (folder / ADAPTER_CONFIG).is_file() and any((folder / name).is_file() for name in ADAPTER_FILES)


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """What the adapter in `folder` says of itself.

    Raises:
        AdapterError: when there is no readable LoRA adapter in the folder.
    """
    folder = Path(folder)
    settings = read_settings(folder)
    run = _read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
    targets = settings.get("target_modules") or ()
    return AdapterConfig(
        rank=settings["r"],
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        is_reward_model=settings.get("task_type") == "SEQ_CLS",
        base_model=run.get("base_model_name_or_path") or settings.get("base_model_name_or_path"),
        prompt_format=run.get("prompt_format"),
        quantization_bit=run.get("quantization_bit"),
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter.

    Raises:
        AdapterError: for a folder without an adapter, or an adapter of another kind.
    """
    if not is_adapter_checkpoint(folder):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise AdapterError(f"{folder} is no adapter: it needs {ADAPTER_CONFIG} and {ADAPTER_FILES[0]} (found: {there})")
    settings = _read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is a {settings.get('peft_type')} adapter; only LORA is supported")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float):
            raise AdapterError(f"{folder / ADAPTER_CONFIG}: {name} is {settings.get(name)!r}; expected a number")
    return settings


def read_tensors(folder: Path) -> dict[str, "torch.Tensor"]:
    """The adapter's tensors on the CPU, by PEFT's names: `base_model.model.….lora_A.weight`.

    Raises:
        AdapterError: for a damaged file, or one without any pair of matrices.
    """
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = next(folder / name for name in ADAPTER_FILES if (folder / name).is_file())
    try:
        if file.suffix == ".safetensors":
            tensors = load_file(file)
        else:
            tensors = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise AdapterError(f"{file} is damaged ({error}). Copy the adapter again.") from error
    # Some programs save a PEFT model's whole state: the adapter's name is still in there.
    tensors = {name.replace(".default.", "."): value for name, value in tensors.items()}
    if not any(".lora_" in name for name in tensors):
        raise AdapterError(
            f"{file} holds no LoRA matrices (found: {', '.join(sorted(tensors)[:4]) or 'nothing'}). Was it saved under "
            "DeepSpeed ZeRO-3 without gathering the weights?"
        )
    empty = next((name for name, value in tensors.items() if value.numel() == 0), None)
    if empty:
        raise AdapterError(
            f"{file}: {empty} is empty; it was saved under DeepSpeed ZeRO-3 without gathering the weights"
        )
    return tensors


def write_adapter(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, "torch.Tensor"]) -> None:
    """Writes PEFT's two files of an adapter to `folder`."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    save_file(copies, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
    (folder / ADAPTER_CONFIG).write_text(
        json.dumps(dict(settings), ensure_ascii=False, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    shutil.copymode(folder / ADAPTER_CONFIG, folder / ADAPTER_FILES[0])  # safetensors lets nobody else read its files


def write_run(
    folder: Path, *, base_model: str | None, prompt_format: str | None, quantization_bit: int | None = None
) -> None:
    """Writes what PEFT's files do not say beside them."""
    run = {
        "base_model_name_or_path": base_model,
        "prompt_format": prompt_format,
        "quantization_bit": quantization_bit,
    }
    (folder / RUN_FILE).write_text(json.dumps(run, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds a {type(value).__name__}; expected an object")
    return value
