"""Prefixes and adapters between this project's files and the original code's, without the base model's weights.

`export.py` is the program; `pytest tests/test_export.py` exercises it. What was written is read again and compared
before it gets its name.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from finetune_chatmodel_demo.chatglm3.adapter_files import (
    AdapterError,
    read_adapter_config,
    read_settings,
    read_tensors,
    write_adapter,
    write_run,
)
from finetune_chatmodel_demo.chatglm3.adapters import check_adapter, read_adapter
from finetune_chatmodel_demo.chatglm3.checkpoints import (
    CONFIG_FILE,
    OFFICIAL_FILE,
    OFFICIAL_KEY,
    SAFE_FILE,
    PrefixError,
    check_prefix,
    read_prefix_config,
    read_prefix_parameters,
    write_prefix,
)
from finetune_chatmodel_demo.chatglm3.comparing import (
    Comparison,
    ComparisonError,
    compare_logits,
    probe_logits,
)
from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.loading import load_model
from finetune_chatmodel_demo.chatglm3.official_adapters import (
    LORA_A,
    LORA_B,
    LoraModule,
    has_official_names,
    lora_scale,
    read_modules,
    to_official_names,
)
from finetune_chatmodel_demo.chatglm3.whole_folder import whole_folder

OWN, OFFICIAL, BOTH = "safetensors", "official", "both"
PREFIX_FILES = {OWN: (SAFE_FILE,), OFFICIAL: (OFFICIAL_FILE,), BOTH: (SAFE_FILE, OFFICIAL_FILE)}
# Largest error of a product of matrices, as a share of its largest number, that the order of sums in float32 explains.
PRODUCT_TOLERANCE = 1e-5


def convert_prefix(
    source: Path,
    output: Path,
    *,
    form: str = BOTH,
    fold_projection: bool = False,
    model: Path | None = None,
    probes: Sequence[Sequence[int]] = (),
    device: str = "cpu",
) -> Comparison | None:
    """Writes a prefix checkpoint in another form.

    Args:
        source: a prefix checkpoint of this project or of the original demo.
        output: the new folder; written whole or not at all.
        form: OWN, OFFICIAL or BOTH.
        fold_projection: whether the MLP is computed once and a plain prefix is written.
        model: the base model, to compare logits; None: tensors are compared alone.
        probes: token ids for that.
        device: for torch.

    Returns:
        The comparison of logits, with a model.

    Raises:
        PrefixError: for a prefix that cannot be read, has no projection to fold, or belongs to another base model.
        ComparisonError: what was written reads differently; nothing of it is left.
    """
    parameters, found = read_prefix_parameters(source), read_prefix_config(source)
    if fold_projection and not found.prefix_projection:
        raise PrefixError(f"{source} has no projection to fold: its prefix is stored as it is. Leave the flag out.")
    if model is not None:
        check_prefix(source, ChatGLM3Config.from_pretrained(model))
    if fold_projection:
        parameters = fold(parameters)
    config = _read_config(source) | {
        "pre_seq_len": found.pre_seq_len,
        "prefix_projection": found.prefix_projection and not fold_projection,
        "base_model_name_or_path": found.base_model,
        "prompt_format": found.prompt_format,
    }
    with whole_folder(output) as partial:
        write_prefix(partial, parameters, config, files=PREFIX_FILES[form])
        _check_written(partial, output, parameters)
        if model is None:
            return None
        expected = _prefix_logits(model, source, probes, device)
        comparison = compare_logits(_prefix_logits(model, partial, probes, device), expected, torch.float32)
        comparison.check(f"{output}, reloaded, does not compute what {source} does")
    return comparison


def fold(parameters: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The prefix that the MLP computes, as an embedding: (pre_seq_len, layers × 2 × groups × channels)."""
    hidden = parameters["embedding.weight"].float()
    for name in ("trans.0", "trans.2"):
        hidden = torch.nn.functional.linear(
            hidden, parameters[f"{name}.weight"].float(), parameters[f"{name}.bias"].float()
        )
        if name == "trans.0":
            hidden = torch.tanh(hidden)
    return {"embedding.weight": hidden}


def convert_adapter(source: Path, output: Path, model: Path, *, form: str) -> float:
    """Writes an adapter with the names and modules of the original code, or with this project's.

    Args:
        source: an adapter of either kind.
        output: the new folder; written whole or not at all.
        model: folder of the base model; only its config.json is read.
        form: OFFICIAL or OWN.

    Returns:
        Largest difference between what the two adapters add to a weight, as a share of the largest number in it.

    Raises:
        AdapterError: for an adapter that cannot be read, or has no exact form on the other side.
        ComparisonError: what was written adds something else; nothing of it is left.
    """
    if form == BOTH:
        raise AdapterError("an adapter's two forms have the same file names: write official and safetensors apart")
    config = ChatGLM3Config.from_pretrained(model)
    check_adapter(source, config)
    settings, tensors = own = read_adapter(source, config)
    if form == OFFICIAL:
        is_official = has_official_names(read_tensors(source))
        settings, tensors = (
            (read_settings(source), read_tensors(source)) if is_official else to_official_names(*own, config)
        )
    found = read_adapter_config(source)
    with whole_folder(output) as partial:
        write_adapter(partial, settings, tensors)
        if form == OWN:
            write_run(
                partial,
                base_model=found.base_model,
                prompt_format=found.prompt_format,
                quantization_bit=found.quantization_bit,
            )
        difference = compare_changes(own, read_adapter(partial, config))
        if not difference <= PRODUCT_TOLERANCE:
            raise ComparisonError(f"{output}, reloaded, adds something else than {source} ({difference:.1e})")
    return difference


def compare_changes(
    first: tuple[Mapping[str, Any], Mapping[str, torch.Tensor]],
    second: tuple[Mapping[str, Any], Mapping[str, torch.Tensor]],
) -> float:
    """Largest difference of two adapters' changes (scale × B·A of every module) and of their other tensors.

    Args:
        first, second: settings and tensors, with this project's names.

    Returns:
        The difference as a share of the largest number of each tensor; infinite where the modules are not the same.
    """
    (modules, whole), (other_modules, other_whole) = (read_modules(*adapter) for adapter in (first, second))
    if modules.keys() != other_modules.keys() or whole.keys() != other_whole.keys():
        return float("inf")
    shares = [_relative(whole[name], other_whole[name]) for name in whole]
    for name, module in modules.items():
        # One module at a time: all of them together are as large as the model.
        one, other = _changes(first[0], module), _changes(second[0], other_modules[name])
        if one.keys() != other.keys():
            return float("inf")
        shares += [_relative(one[part], other[part]) for part in one]
    return max(shares)


def _changes(settings: Mapping[str, Any], module: LoraModule) -> dict[str, torch.Tensor]:
    """scale × B·A, and what else there is."""
    scale = lora_scale(module, bool(settings.get("use_rslora")))
    product = module.tensors[LORA_B].float() @ module.tensors[LORA_A].float() * scale
    others = {part: value.float() for part, value in module.tensors.items() if part not in (LORA_A, LORA_B)}
    return {"product": product} | others


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    largest = expected.abs().max().clamp(min=torch.finfo(torch.float32).tiny)
    return ((found - expected).abs().max() / largest).item()


def _check_written(folder: Path, output: Path, parameters: Mapping[str, torch.Tensor]) -> None:
    """Every form that was written, read again, is the same bit for bit."""
    forms = []
    if (folder / SAFE_FILE).is_file():
        forms.append(read_prefix_parameters(folder))
    if (folder / OFFICIAL_FILE).is_file():
        state = torch.load(folder / OFFICIAL_FILE, map_location="cpu", weights_only=True)
        forms.append({name.removeprefix(OFFICIAL_KEY): value for name, value in state.items()})
    for found in forms:
        is_equal = found.keys() == parameters.keys()
        if not is_equal or any(not torch.equal(found[name], value) for name, value in parameters.items()):
            raise ComparisonError(f"{output}: the files, read again, are not what was written; is the disk in order?")


def _prefix_logits(model: Path, prefix: Path, probes: Sequence[Sequence[int]], device: str) -> list[torch.Tensor]:
    return probe_logits(load_model(model, pt_checkpoint=prefix, dtype=torch.float32, device=device), probes)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
