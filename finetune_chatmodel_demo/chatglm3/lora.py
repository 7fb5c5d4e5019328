"""LoRA adapters (Hu et al., 2021, arXiv:2106.09685) through PEFT: made, checked, loaded, saved, switched off.

Adapters of this project and of the original code are read.
"""

import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.fingerprint import read_fingerprint
from finetune_chatmodel_demo.chatglm3.lora_files import (
    MERGED_FOLDER,
    PREFIX,
    has_official_names,
    read_adapter_config,
    read_settings,
    read_tensors,
    to_own_names,
    write_adapter,
    write_run,
)
from finetune_chatmodel_demo.chatglm3.modeling import ChatGLM3ForCausalLM, ChatGLM3ForSequenceClassification
from finetune_chatmodel_demo.chatglm3.weights import LINEAR_MODULES, OFFICIAL_MODULES
from finetune_chatmodel_demo.common.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from peft import PeftModel


def resolve_modules(names: str, model: nn.Module) -> list[str]:
    """Module names of `names` ("all", or a,b,c in transformers' or the original's names) that `model` has.

    Raises:
        UserError: for a name that no linear module of the model has.
    """
    if names.strip() == "all":
        return list(LINEAR_MODULES)
    known = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found: list[str] = []
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in known and name not in OFFICIAL_MODULES:
            hint = did_you_mean(name, [*known, *OFFICIAL_MODULES]) or f"; there are {', '.join(sorted(known))}"
            raise UserError(f"the model has no linear module {name!r}{hint}")
        found += [module for module in OFFICIAL_MODULES.get(name, (name,)) if module not in found]
    if not found:
        raise UserError(f"no module is named in {names!r}; write all, or names such as {','.join(LINEAR_MODULES)}")
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
        UserError: for unknown modules or impossible numbers.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise UserError(f"the rank of a LoRA adapter is {rank}; it must be at least 1")
    if not 0 <= dropout < 1:
        raise UserError(f"the dropout of a LoRA adapter is {dropout}; it must be at least 0 and below 1")
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
    with _quiet_peft():
        return get_peft_model(model, config)


@contextmanager
def _quiet_peft() -> Iterator[None]:
    """PEFT's warnings about transformers' names, and about keys that `_check_complete` turns into an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.* is deprecated", category=FutureWarning)
        yield


def read_adapter(folder: str | Path, config: ChatGLM3Config) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """adapter_config.json and the tensors of an adapter, with the names of this project's model.

    Args:
        folder: an adapter of this project, or one that was trained on the original code.
        config: of the base model.

    Raises:
        UserError: for a missing or damaged adapter, or an original one that cannot be taken over.
    """
    folder = Path(folder)
    settings, tensors = read_settings(folder), read_tensors(folder)
    if has_official_names(tensors):
        try:
            settings, tensors = to_own_names(settings, tensors, config)
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
    return settings, tensors


def check_adapter(folder: str | Path, config: ChatGLM3Config) -> None:
    """Refuses an adapter that was trained for another base model than `config` describes, before gigabytes are read.

    Raises:
        UserError: as `load_adapter`.
    """
    settings, tensors = read_adapter(folder, config)
    kind = ChatGLM3ForSequenceClassification if settings.get("task_type") == "SEQ_CLS" else ChatGLM3ForCausalLM
    with torch.device("meta"):
        model = kind(config)
    _check_tensors(Path(folder), settings, tensors, model)


def merge_into_base(model: nn.Module, folder: str | Path) -> nn.Module:
    """Adds the adapter in `folder` to the weights of `model`, which a new adapter can then stand on.

    A language model's adapter also goes into a reward model, whose layers are the same.

    Raises:
        UserError: as `load_adapter`, or for a base in 4 or 8 bits, whose weights are rounded.
    """
    if _quantization_bit(model):
        raise UserError(f"the adapter {folder} is merged into the base, whose weights must not be quantized")
    return merge_adapter(load_adapter(model, folder, below_new=True))


def merge_adapter(adapted: Any) -> nn.Module:
    """Adds an adapter to the weights, each in float32, and takes PEFT out of the model.

    Args:
        adapted: a PeftModel on an unquantized base.

    Raises:
        ValueError: for an adapter with numbers that are not finite.
    """
    from peft.tuners.lora import LoraLayer

    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            weight = module.get_base_layer().weight
            dtype, weight.data = weight.dtype, weight.data.float()
            module.merge(safe_merge=True)
            weight.data = weight.data.to(dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="All adapters are already merged")
        merged = adapted.merge_and_unload()
    vars(merged).pop("peft_config", None)  # or the next adapter would be taken for a second one
    return merged


def load_adapter(
    model: nn.Module, folder: str | Path, *, is_trainable: bool = False, below_new: bool = False
) -> "PeftModel":
    """Loads the adapter in `folder` into `model`, which is frozen.

    An adapter that was trained on top of another one has that one in `merged_adapter`; it is merged into `model` first.

    Args:
        model: the base model that the adapter was trained for.
        folder: an adapter of this project, or one that was trained on the original code.
        is_trainable: whether the adapter's parameters are to be trained on.
        below_new: whether it will be merged; then a language model's may also be loaded into a reward model.

    Raises:
        UserError: for a missing or damaged adapter, another kind of head, or shapes of another base model.
    """
    from peft import PeftModel

    folder = Path(folder)
    found = read_adapter_config(folder)
    if (folder / MERGED_FOLDER).is_dir():
        model = merge_into_base(model, folder / MERGED_FOLDER)
    is_below_head = below_new and not found.is_reward_model
    if found.is_reward_model != has_score_head(model) and not is_below_head:
        kinds = {True: "a reward model (stage rm)", False: "a language model"}
        raise UserError(
            f"{folder} is an adapter of {kinds[found.is_reward_model]}, not of {kinds[not found.is_reward_model]}"
        )
    settings, tensors = read_adapter(folder, model.config)
    if is_below_head:
        settings = {**settings, "task_type": None}  # PEFT would look for what only language models have
    _check_tensors(folder, settings, tensors, model)
    with tempfile.TemporaryDirectory(prefix="adapter-") as scratch, _quiet_peft():
        # From files of our own: an original adapter has other names, and PEFT would read a pickle in its own way.
        write_adapter(Path(scratch), settings, tensors)
        try:
            adapted = PeftModel.from_pretrained(model, scratch, is_trainable=is_trainable)
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"the adapter {folder} does not fit this base model, or is damaged: {error}") from error
    _check_complete(folder, adapted, tensors)
    return adapted


def _check_tensors(folder: Path, settings: Mapping[str, Any], tensors: Mapping[str, Any], model: nn.Module) -> None:
    """Compares the adapter's shapes with the modules that they belong to.

    Raises:
        UserError: for a module that the model does not have, or that has another size.
    """
    base = settings.get("base_model_name_or_path")
    hint = f"The adapter was trained for another base model{f': {base}' if base else ''}"
    modules = dict(model.named_modules())
    for name, tensor in tensors.items():
        module, _, part = name.removeprefix(PREFIX).partition(".lora_")
        if not part:
            continue
        if module not in modules:
            raise UserError(f"{folder}: the model has no module {module}. {hint}")
        wanted = _sizes(modules[module])
        axis = {"A.weight": -1, "B.weight": 0, "magnitude_vector": 0, "magnitude_vector.weight": 0}.get(part)
        if axis is not None and wanted and tensor.shape[axis] != wanted[axis]:
            raise UserError(
                f"{folder}: {module}.lora_{part} is {tuple(tensor.shape)}; the base model's module is {wanted}. {hint}"
            )


def _sizes(module: nn.Module) -> tuple[int, int] | None:
    """(out, in) of a linear module, quantized or not."""
    return (module.out_features, module.in_features) if isinstance(module, nn.Linear) else None


def _check_complete(folder: Path, adapted: "PeftModel", tensors: Mapping[str, torch.Tensor]) -> None:
    """PEFT leaves out what it does not find; an adapter that was loaded in part answers nonsense."""
    from peft import get_peft_model_state_dict

    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    missing = sorted(expected - tensors.keys())
    extra = sorted(name for name in tensors.keys() - expected if ".lora_" in name)
    if missing or extra:
        raise UserError(
            f"{folder}: keys missing: {', '.join(missing[:4]) or 'none'}; left over: {', '.join(extra[:4]) or 'none'}. "
            "Was it trained for another base model, or with other target_modules than adapter_config.json says?"
        )


def save_adapter(
    model: "PeftModel",
    folder: str | Path,
    *,
    base_model: str | None = None,
    prompt_format: str | None = None,
    state_dict: Mapping[str, torch.Tensor] | None = None,
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
    bits = _quantization_bit(model)
    write_run(
        folder,
        base_model=base_model,
        prompt_format=prompt_format,
        quantization_bit=bits,
        base_fingerprint=read_fingerprint(base_model),
    )


def _quantization_bit(model: nn.Module) -> int | None:
    quantization = getattr(model.config, "quantization_config", None)
    return (4 if quantization.load_in_4bit else 8) if quantization is not None else None


@contextmanager
def without_tuning(model: nn.Module) -> Iterator[None]:
    """Within this context a model with an adapter or a prefix is its base: the same weights without what was trained.

    Raises:
        ValueError: for a model that has neither: its base is gone, or it is the base itself.
    """
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
    elif getattr(model, "prefix_encoder", None) is not None:
        with model.prefix_disabled():
            yield
    else:
        raise ValueError("the model has neither a prefix nor an adapter that could be switched off")


def has_score_head(model: nn.Module) -> bool:
    """Whether a model is a reward model rather than a language model."""
    return hasattr(model, "score")


def _full_modules(model: nn.Module, names: str | None) -> list[str] | None:
    """Modules that an adapter holds whole: the score head and what was asked for."""
    wanted: Sequence[str] = [part.strip() for part in (names or "").split(",") if part.strip()]
    known = {name.rpartition(".")[2] for name, _ in model.named_modules() if name}
    for name in wanted:
        if name not in known:
            raise UserError(f"the model has no module {name!r}{did_you_mean(name, known)}")
    modules = [*(["score"] if has_score_head(model) else []), *wanted]
    return modules or None
