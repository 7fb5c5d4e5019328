"""LoRA adapters (Hu et al., 2021, arXiv:2106.09685) through PEFT: made, saved, loaded, with the names of this project.

An adapter is a folder: `adapter_model.safetensors` and `adapter_config.json` are PEFT's, `chatglm3_run.json` holds the
base model's name and the prompt format. Exercise it with `pytest tests/test_adapters.py`.
"""

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    import torch
    from peft import PeftModel

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
RUN_FILE = "chatglm3_run.json"
# Linear modules of a decoder layer, in the order of their computation.
LINEAR_MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj")
# The original code's names, which published commands use as --lora_target.
OFFICIAL_MODULES = {
    "query_key_value": ("q_proj", "k_proj", "v_proj"),
    "dense": ("o_proj",),
    "dense_h_to_4h": ("gate_up_proj",),
    "dense_4h_to_h": ("down_proj",),
}


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
    """

    rank: int
    target_modules: tuple[str, ...]
    is_reward_model: bool
    base_model: str | None = None
    prompt_format: str | None = None


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
    if not is_adapter_checkpoint(folder):
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) if folder.is_dir() else "no such folder"
        raise AdapterError(f"{folder} is no adapter: it needs {ADAPTER_CONFIG} and {ADAPTER_FILES[0]} (found: {there})")
    config = _read_json(folder / ADAPTER_CONFIG)
    run = _read_json(folder / RUN_FILE) if (folder / RUN_FILE).is_file() else {}
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{folder} is a {config.get('peft_type')} adapter; only LORA is supported")
    targets = config.get("target_modules") or ()
    return AdapterConfig(
        rank=config["r"],
        target_modules=(targets,) if isinstance(targets, str) else tuple(sorted(targets)),
        is_reward_model=config.get("task_type") == "SEQ_CLS",
        base_model=run.get("base_model_name_or_path") or config.get("base_model_name_or_path"),
        prompt_format=run.get("prompt_format"),
    )


def resolve_modules(names: str, model: nn.Module) -> list[str]:
    """Module names of `names` ("all", or a,b,c in transformers' or the original's names) that `model` has.

    Raises:
        AdapterError: for a name that no linear module of the model has.
    """
    if names.strip() == "all":
        return list(LINEAR_MODULES)
    known = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: list[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known and name not in OFFICIAL_MODULES:
            close = difflib.get_close_matches(name, [*known, *OFFICIAL_MODULES], n=1)
            hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(known))}"
            raise AdapterError(f"the model has no linear module {name!r}; {hint}")
        found += [module for module in OFFICIAL_MODULES.get(name, (name,)) if module not in found]
    if not found:
        raise AdapterError(f"no module is named in {names!r}; write all, or names such as {','.join(LINEAR_MODULES)}")
    return found


def add_adapter(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: int | None = None,
    dropout: float = 0.0,
    target: str = "all",
    additional_target: str | None = None,
    use_rslora: bool = False,
    use_dora: bool = False,
) -> "PeftModel":
    """Puts a new, trainable LoRA adapter into `model` and freezes the rest; its output does not change yet.

    Args:
        model: ChatGLM3ForCausalLM or ChatGLM3ForSequenceClassification, whose score head is then trained in full.
        rank: of each pair of matrices.
        alpha: the adapter's scale × rank; default: 2 × rank.
        dropout: in front of the adapter.
        target: see `resolve_modules`.
        additional_target: modules trained in full and saved with the adapter, a,b,c.
        use_rslora: scale by alpha / √rank.
        use_dora: train magnitudes apart from directions.

    Raises:
        AdapterError: for unknown modules or impossible numbers.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise AdapterError(f"the rank of a LoRA adapter is {rank}; it must be at least 1")
    if not 0 <= dropout < 1:
        raise AdapterError(f"the dropout of a LoRA adapter is {dropout}; it must be at least 0 and below 1")
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank if alpha is None else alpha,
        lora_dropout=dropout,
        target_modules=resolve_modules(target, model),
        modules_to_save=_full_modules(model, additional_target),
        use_rslora=use_rslora,
        use_dora=use_dora,
        task_type="SEQ_CLS" if has_score_head(model) else "CAUSAL_LM",
    )
    return get_peft_model(model, config)


def load_adapter(model: nn.Module, folder: str | Path, *, is_trainable: bool = False) -> "PeftModel":
    """Loads the adapter in `folder` into `model`, which is frozen.

    Args:
        model: the base model that the adapter was trained for.
        folder: an adapter checkpoint.
        is_trainable: whether the adapter's parameters are to be trained on.

    Raises:
        AdapterError: for a missing or damaged adapter, another kind of head, or shapes of another base model.
    """
    from peft import PeftModel

    found = read_adapter_config(folder)
    if found.is_reward_model != has_score_head(model):
        kinds = {True: "a reward model (stage rm)", False: "a language model"}
        raise AdapterError(
            f"{folder} is an adapter of {kinds[found.is_reward_model]}, not of {kinds[not found.is_reward_model]}"
        )
    try:
        return PeftModel.from_pretrained(model, str(folder), is_trainable=is_trainable)
    except (RuntimeError, ValueError, OSError) as error:
        raise AdapterError(f"the adapter {folder} does not fit this base model, or is damaged: {error}") from error


def save_adapter(
    model: "PeftModel",
    folder: str | Path,
    *,
    base_model: str | None = None,
    prompt_format: str | None = None,
    state_dict: Mapping[str, "torch.Tensor"] | None = None,
) -> None:
    """Writes the model's adapter to `folder`.

    Args:
        model: from `add_adapter` or `load_adapter`.
        folder: created when missing.
        base_model: folder or hub name of the base model.
        prompt_format: the format it was trained with.
        state_dict: the model's state where its parameters are spread over processes.
    """
    folder = Path(folder)
    if base_model is not None:
        model.peft_config[model.active_adapter].base_model_name_or_path = base_model
    model.save_pretrained(str(folder), state_dict=None if state_dict is None else dict(state_dict))
    (folder / "README.md").unlink(missing_ok=True)  # PEFT's empty model card
    run = {"base_model_name_or_path": base_model, "prompt_format": prompt_format}
    (folder / RUN_FILE).write_text(json.dumps(run, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def has_score_head(model: nn.Module) -> bool:
    """Whether a model is a reward model rather than a language model."""
    return hasattr(model, "score")


def _full_modules(model: nn.Module, names: str | None) -> list[str] | None:
    """Modules that an adapter holds whole: the score head and what was asked for."""
    wanted: Sequence[str] = [part.strip() for part in (names or "").split(",") if part.strip()]
    known = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
    for name in wanted:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise AdapterError(f"the model has no module {name!r}" + (f"; did you mean {close[0]}?" if close else ""))
    modules = [*(["score"] if has_score_head(model) else []), *wanted]
    return modules or None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise AdapterError(f"{path} holds a {type(value).__name__}; expected an object")
    return value
