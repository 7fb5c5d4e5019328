"""The files of a LoRA adapter: what one says of itself, its tensors, and writing them. No model is needed here.

An adapter is a folder: `adapter_model.safetensors` (older ones: `adapter_model.bin`) and `adapter_config.json` are
PEFT's, `chatglm3_run.json` holds the base model's name and the prompt format.

Adapters that were trained on the original code are read as well: the same numbers under other names. Its model has one
linear module `query_key_value` where there are three here: A is shared by all three, and B is cut into their rows.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.fingerprint import Fingerprint
from finetune_chatmodel_demo.chatglm3.weights import (
    FUSED_MODULE,
    OFFICIAL_NAMES,
    SPLIT_MODULES,
    check_finite,
    query_key_value_rows,
    read_tensor_file,
)
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import write_json

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
RUN_FILE = "chatglm3_run.json"
# Within an adapter: the one that was merged into the base before it was trained.
MERGED_FOLDER = "merged_adapter"
PREFIX = "base_model.model."
LORA_A = "lora_A.weight"
# Starts that leave the base as it is. The others (PiSSA, OLoRA, LoftQ …) change it, each module in its own way.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
# PEFT settings under which an adapter holds more than pairs of matrices, or belongs to a changed model.
OTHER_FEATURES = ("layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora", "arrow_config")


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
        base_fingerprint: see `fingerprint`; None: an old adapter, or one from elsewhere.
    """

    rank: int
    target_modules: tuple[str, ...]
    is_reward_model: bool
    base_model: str | None = None
    prompt_format: str | None = None
    quantization_bit: int | None = None
    base_fingerprint: Fingerprint | None = None


def is_adapter_checkpoint(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter."""
    folder = Path(folder)
    return (folder / ADAPTER_CONFIG).is_file() and any((folder / name).is_file() for name in ADAPTER_FILES)


def read_adapter_config(folder: str | Path) -> AdapterConfig:
    """What the adapter in `folder` says of itself.

    Raises:
        UserError: when there is no readable LoRA adapter in the folder.
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
        base_fingerprint=run.get("base_fingerprint"),
    )


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json of a LoRA adapter.

    Raises:
        UserError: for a folder without an adapter, or an adapter of another kind.
    """
    if not is_adapter_checkpoint(folder):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise UserError(f"{folder} is no adapter: it needs {ADAPTER_CONFIG} and {ADAPTER_FILES[0]} (found: {there})")
    settings = _read_json(folder / ADAPTER_CONFIG)
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{folder} is a {settings.get('peft_type')} adapter; only LORA is supported")
    for name in ("r", "lora_alpha"):
        if not isinstance(settings.get(name), int | float):
            raise UserError(f"{folder / ADAPTER_CONFIG}: {name} is {settings.get(name)!r}; expected a number")
    return settings


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """The adapter's tensors on the CPU, by PEFT's names: `base_model.model.….lora_A.weight`.

    Raises:
        UserError: for a damaged file, or one without any pair of matrices.
    """
    file = next(folder / name for name in ADAPTER_FILES if (folder / name).is_file())
    tensors = read_tensor_file(file, "Copy the adapter again.")
    # Some programs save a PEFT model's whole state: the adapter's name is still in there.
    tensors = {name.replace(".default.", "."): value for name, value in tensors.items()}
    if not any(".lora_" in name for name in tensors):
        raise UserError(
            f"{file} holds no LoRA matrices (found: {', '.join(sorted(tensors)[:4]) or 'nothing'}). Was it saved under "
            "DeepSpeed ZeRO-3 without gathering the weights?"
        )
    empty = next((name for name, value in tensors.items() if value.numel() == 0), None)
    if empty:
        raise UserError(f"{file}: {empty} is empty; it was saved under DeepSpeed ZeRO-3 without gathering the weights")
    check_finite(file, tensors.items())
    return tensors


def write_adapter(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """Writes PEFT's two files of an adapter to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    copies = {name: value.detach().to("cpu", copy=True).contiguous() for name, value in tensors.items()}
    save_file(copies, folder / ADAPTER_FILES[0], metadata={"format": "pt"})
    write_json(folder / ADAPTER_CONFIG, dict(sorted(settings.items())))
    shutil.copymode(folder / ADAPTER_CONFIG, folder / ADAPTER_FILES[0])  # safetensors lets nobody else read its files


def write_run(
    folder: Path,
    *,
    base_model: str | None,
    prompt_format: str | None,
    quantization_bit: int | None = None,
    base_fingerprint: Fingerprint | None = None,
) -> None:
    """Writes what PEFT's files do not say beside them."""
    run = {
        "base_model_name_or_path": base_model,
        "prompt_format": prompt_format,
        "quantization_bit": quantization_bit,
        "base_fingerprint": base_fingerprint,
    }
    write_json(folder / RUN_FILE, run)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}; expected an object")
    return value


def has_official_names(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether an adapter was trained on the original code."""
    return any(name.startswith(f"{PREFIX}transformer.") for name in tensors)


def to_own_names(
    settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], config: ChatGLM3Config
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An adapter of the original code with the names of this project's model.

    Args:
        settings: adapter_config.json.
        tensors: by PEFT's names, `base_model.model.transformer.encoder.layers.0.….lora_A.weight`.
        config: of the base model; the rows of query, key and value follow from it.

    Returns:
        The settings and tensors of an adapter that computes the same.

    Raises:
        UserError: for features of PEFT that depend on how the modules are cut, or for other shapes.
    """
    _check_features(settings)
    result: dict[str, torch.Tensor] = {}
    ranks, alphas, whole = {}, {}, set()
    for name, value in tensors.items():
        official, marker, part = name.removeprefix(PREFIX).partition(".lora_")
        if not marker:
            result[own := PREFIX + _to_own_module(official)] = value
            whole.add(own.split(".")[-2])
            continue
        for module, rows in _cut(_to_own_module(official), f"lora_{part}", value, config).items():
            result[f"{PREFIX}{module}.lora_{part}"] = rows
            ranks[module] = _of_pattern(settings.get("rank_pattern"), official, settings["r"])
            alphas[module] = _of_pattern(settings.get("alpha_pattern"), official, settings["lora_alpha"])
    short = {module.rpartition(".")[2] for module in ranks}
    is_everywhere = len(ranks) == len(short) * config.num_layers
    return dict(settings) | {
        "target_modules": sorted(short if is_everywhere else ranks),
        "rank_pattern": {module: rank for module, rank in ranks.items() if rank != settings["r"]},
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != settings["lora_alpha"]},
        "modules_to_save": sorted(whole) or None,
        "task_type": "SEQ_CLS" if settings.get("task_type") == "SEQ_CLS" else "CAUSAL_LM",
        "auto_mapping": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }, result


def _cut(module: str, part: str, value: torch.Tensor, config: ChatGLM3Config) -> dict[str, torch.Tensor]:
    """One tensor of an original module → those of the modules here: A for each of them, rows of everything else."""
    if not module.endswith(FUSED_MODULE):
        return {module: value}
    own = [module.removesuffix(FUSED_MODULE) + name for name in SPLIT_MODULES]
    if part == LORA_A:
        return dict.fromkeys(own, value)
    rows = query_key_value_rows(config)
    if value.shape[0] != sum(rows):
        raise UserError(
            f"{module}.{part} has {value.shape[0]} rows; this base model's query_key_value has {sum(rows)}. The "
            "adapter was trained for another base model"
        )
    return dict(zip(own, value.split(rows)))


def _check_features(settings: Mapping[str, Any]) -> None:
    found = [f"{name}={settings[name]!r}" for name in OTHER_FEATURES if settings.get(name)]
    if settings.get("bias", "none") != "none":
        found.append(f"bias={settings['bias']!r}")
    if settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        found.append(f"init_lora_weights={settings['init_lora_weights']!r}")
    if any(FUSED_MODULE.endswith(str(name)) for name in settings.get("modules_to_save") or ()):
        found.append(f"modules_to_save={settings['modules_to_save']!r}")
    if found:
        raise UserError(
            f"adapter_config.json says {', '.join(found)}: such an adapter depends on how the model's modules are cut, "
            "and the original code cuts them differently. Merge it where it was trained"
        )


def _to_own_module(name: str) -> str:
    for official, own in OFFICIAL_NAMES.items():
        name = re.sub(rf"(?<![^.]){re.escape(official)}(?![^.])", own, name)
    return name


def _of_pattern(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of a module's name."""
    matching = (value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", name))
    return next(matching, default)


def copy_adapter(source: Path, target: Path) -> None:
    """Copies an adapter, and the one that it stands on, without checkpoints and logs beside it."""
    target.mkdir(parents=True, exist_ok=True)
    for path in source.iterdir():
        if (path.is_file() and path.name.startswith("adapter_")) or path.name == RUN_FILE:
            shutil.copy(path, target)
    if (source / MERGED_FOLDER).is_dir():
        copy_adapter(source / MERGED_FOLDER, target / MERGED_FOLDER)
