"""Whole models, prefixes and adapters in the form that others read: merged, converted, reloaded and compared.

Everything is computed in float32 by default, because an adapter's change is often smaller than the last bit of a
half-precision weight. What was written is read again and compared before it gets its name.
"""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finetune_chatmodel_demo.chatglm3.comparing import Comparison, ComparisonError, compare_logits, probe_logits
from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.loading import MODEL_CLASSES, load_model
from finetune_chatmodel_demo.chatglm3.lora import (
    check_adapter,
    load_adapter,
    merge_adapter,
    read_adapter,
    without_tuning,
)
from finetune_chatmodel_demo.chatglm3.lora_files import read_adapter_config, write_adapter, write_run
from finetune_chatmodel_demo.chatglm3.model_folder import read_model_config
from finetune_chatmodel_demo.chatglm3.prefix_files import (
    CONFIG_FILE,
    OFFICIAL_FILE,
    OFFICIAL_KEY,
    SAFE_FILE,
    check_prefix,
    read_prefix_config,
    read_prefix_parameters,
    write_prefix,
)
from finetune_chatmodel_demo.chatglm3.weights import read_tensor_file
from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.files import format_size, whole_folder

# Form of a converted prefix → its files.
FORMS = {"safetensors": (SAFE_FILE,), "official": (OFFICIAL_FILE,), "both": (SAFE_FILE, OFFICIAL_FILE)}
TOKENIZER_FILES = ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "tokenization_chatglm.py")
# What official folders hold beside weights and tokenizer: the original code, and the weights' licence.
OTHER_FILES = (
    "configuration_chatglm.py",
    "modeling_chatglm.py",
    "quantization.py",
    "MODEL_LICENSE",
    "LICENSE",
)
# Where rounding changes the logits by more than this share of what the adapter changes, that is said.
NOTABLE_ROUNDING = 0.1
# A folder that has one of these is a model, a prefix or an adapter, and may be replaced when that is asked for.
REPLACEABLE = ("config.json", "adapter_config.json")
# Of the bytes that are counted, for file headers and what is not counted.
DISK_RESERVE = 1.02


@dataclass(frozen=True)
class ModelExport:
    """What is to be written.

    Attributes:
        model: folder of the base or whole model.
        adapters: folders of adapters, merged one after the other.
        output: the new folder.
        tokenizer: folder with `tokenizer.model`; None: the result has none.
        dtype: of the written weights.
        compute_dtype: of what is computed on the way and of the comparison.
        device: for torch.
        max_shard_size: of a weights file, e.g. "5GB".
        prompt_format: recorded in config.json for inference.py; None: unknown.
        report: gets a line for the user now and then.
    """

    model: Path
    adapters: Sequence[Path]
    output: Path
    tokenizer: Path | None
    dtype: torch.dtype
    compute_dtype: torch.dtype = torch.float32
    device: str = "cpu"
    max_shard_size: str = "5GB"
    prompt_format: str | None = None
    report: Callable[[str], None] = field(default=print)


def export_model(job: ModelExport, probes: Sequence[Sequence[int]]) -> Comparison:
    """Merges, writes, reloads and compares; the output appears only when all of it went well.

    Args:
        job: see `ModelExport`.
        probes: token ids on which the result must compute what the unmerged model computes.

    Returns:
        The comparison of what was written with the unmerged model.

    Raises:
        OSError, UserError: a folder cannot be read, an adapter does not fit, the disk or the memory is too small.
        ComparisonError: the written model computes something else; nothing of it is left.
    """
    config = read_model_config(job.model)
    head = _head_of(job)
    for adapter in job.adapters:
        check_adapter(adapter, config)
    parameters = count_parameters(config, head)
    check_disk(job.output, parameters * job.dtype.itemsize)
    check_memory(parameters, job)
    model = load_model(job.model, dtype=job.compute_dtype, device=job.device, head=head)
    expected, effect = probe_logits(model, probes), 0.0
    for adapter in job.adapters:
        model, expected, effect = _merge(model, adapter, probes, job)
    with whole_folder(job.output) as partial:
        _write(model, partial, job)
        del model
        written = load_model(partial, dtype=job.compute_dtype, device=job.device, head=head)
        comparison = compare_logits(probe_logits(written, probes), expected, job.dtype, job.compute_dtype)
        comparison.check(f"{job.output}, reloaded, does not compute what the model before it computed")
        sizes = [path.stat().st_size for path in partial.glob("*.safetensors")]
    job.report(
        f"written: {job.output} ({len(sizes)} file{'s' if len(sizes) > 1 else ''} of weights, "
        f"{format_size(sum(sizes))}, {_name(job.dtype)})"
    )
    job.report(f"reloaded and compared with the {'unmerged ' if job.adapters else ''}model: {comparison}")
    if job.adapters and comparison.difference > NOTABLE_ROUNDING * effect:
        job.report(
            f"note: the last adapter changes the logits by no more than {effect:.1e}, and rounding to "
            f"{_name(job.dtype)} by {comparison.difference:.1e}; --dtype float32 keeps all of it"
        )
    return comparison


def _merge(
    model: nn.Module, adapter: Path, probes: Sequence[Sequence[int]], job: ModelExport
) -> tuple[nn.Module, list[torch.Tensor], float]:
    """The model with the adapter in its weights, its logits before that, and how much the adapter changes them."""
    adapted = load_adapter(model, adapter)
    expected = probe_logits(adapted, probes)
    with without_tuning(adapted):
        base = probe_logits(adapted, probes)
    effect = compare_logits(expected, base, job.compute_dtype).difference
    merged = merge_adapter(adapted)
    comparison = compare_logits(probe_logits(merged, probes), expected, job.compute_dtype)
    comparison.check(f"{adapter}: the merged model does not compute what the unmerged one does")
    job.report(f"merged: {adapter}, in float32: {comparison}")
    if effect == 0:
        job.report(f"note: {adapter} changes nothing; was it trained?")
    return merged, expected, effect


def _write(model: nn.Module, folder: Path, job: ModelExport) -> None:
    """The official layout; the prefix of a model that has one inside stays float32."""
    for name, parameter in model.named_parameters():
        if "prefix_encoder" not in name:
            parameter.data = parameter.data.to(job.dtype)
    model.config.dtype = job.dtype
    if job.prompt_format is not None:
        model.config.prompt_format = job.prompt_format
    model.save_pretrained(folder, max_shard_size=job.max_shard_size)
    for source, names in ((job.tokenizer, TOKENIZER_FILES), (job.model, OTHER_FILES)):
        for name in names:
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
    for path in folder.glob("*.safetensors"):
        shutil.copymode(folder / "config.json", path)  # safetensors lets nobody else read its files


def _head_of(job: ModelExport) -> str:
    """ "score" for a reward model, else "lm".

    Raises:
        UserError: the adapters and the base are not of one kind.
    """
    names = json.loads((job.model / "config.json").read_text(encoding="utf-8")).get("architectures") or []
    is_reward_base = any("SequenceClassification" in str(name) for name in names)
    kinds = {adapter: read_adapter_config(adapter).is_reward_model for adapter in job.adapters}
    if is_reward_base and not all(kinds.values()):
        raise UserError(f"{job.model} is a reward model (stage rm), and the adapter is a language model's")
    if len(set(kinds.values())) > 1:
        raise UserError(
            "an adapter of a language model and one of a reward model cannot be merged in one go: merge the first, and "
            "give the result as --model for the second"
        )
    return "score" if is_reward_base or any(kinds.values()) else "lm"


def count_parameters(config: ChatGLM3Config, head: str) -> int:
    """Parameters of the model that `config` describes; nothing is allocated."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in MODEL_CLASSES[head](config).parameters())


def check_memory(parameters: int, job: ModelExport) -> None:
    """Refuses to start what would end in the system's killing the program.

    Raises:
        OSError: when the memory that is free does not hold the model.
    """
    if torch.device(job.device).type != "cpu":
        return
    import psutil

    needed, free = parameters * job.compute_dtype.itemsize, psutil.virtual_memory().available
    if needed > free:
        advice = "; --low_memory needs half of it" if job.compute_dtype == torch.float32 else ""
        raise OSError(
            f"{job.model} needs {format_size(needed)} of memory in {_name(job.compute_dtype)}, and {format_size(free)} "
            f"are free{advice}"
        )


def check_output(folder: Path, *, overwrite: bool, sources: Sequence[Path] = ()) -> None:
    """Refuses an output folder that would destroy something.

    Args:
        folder: where the result shall be.
        overwrite: whether an earlier result may be replaced.
        sources: folders that are read.

    Raises:
        UserError: for a folder that is read from, or that holds something and may not be replaced.
    """
    target = folder.resolve()
    for source in (path.resolve() for path in sources):
        if target == source or target in source.parents:
            raise UserError(f"--output {folder} is (or holds) {source}, which is read; choose another folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UserError(f"--output {folder} is a file; give a folder")
    names = sorted(path.name for path in folder.iterdir())
    if not names:
        return
    if not overwrite:
        raise UserError(f"--output {folder} is not empty (found: {', '.join(names[:5])}); --overwrite replaces it")
    runs = [name for name in names if name.startswith("checkpoint-")]
    if runs or not any(name in names for name in REPLACEABLE):
        what = f"holds {runs[0]} of a training run" if runs else f"is no earlier result (found: {', '.join(names[:5])})"
        raise UserError(f"--output {folder} {what}; --overwrite replaces earlier results only, choose another folder")


def check_disk(folder: Path, needed: int) -> None:
    """Refuses to start what the disk cannot hold.

    Args:
        folder: where the result shall be.
        needed: bytes.

    Raises:
        OSError: when they are not free.
    """
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed * DISK_RESERVE > free:
        raise OSError(
            f"--output {folder} needs {format_size(needed)}, and {format_size(free)} are free at {place}; free some "
            "space, choose another disk, or a smaller --dtype"
        )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def convert_prefix(
    source: Path,
    output: Path,
    *,
    form: str = "both",
    fold_projection: bool = False,
    model: Path | None = None,
    probes: Sequence[Sequence[int]] = (),
    device: str = "cpu",
) -> Comparison | None:
    """Writes a prefix checkpoint in another form.

    Args:
        source: a prefix checkpoint of this project or of the original demo.
        output: the new folder; written whole or not at all.
        form: one of `FORMS`.
        fold_projection: whether the MLP is computed once and a plain prefix is written.
        model: the base model, to compare logits; None: tensors are compared alone.
        probes: token ids for that.
        device: for torch.

    Returns:
        The comparison of logits, with a model.

    Raises:
        UserError: for a prefix that cannot be read, has no projection to fold, or belongs to another base model.
        ComparisonError: what was written reads differently; nothing of it is left.
    """
    parameters, found = read_prefix_parameters(source), read_prefix_config(source)
    if fold_projection and not found.prefix_projection:
        raise UserError(f"{source} has no projection to fold: its prefix is stored as it is. Leave the flag out.")
    if model is not None:
        check_prefix(source, read_model_config(model))
    if fold_projection:
        parameters = fold(parameters)
    config = _read_config(source) | {
        "pre_seq_len": found.pre_seq_len,
        "prefix_projection": found.prefix_projection and not fold_projection,
        "base_model_name_or_path": found.base_model,
        "prompt_format": found.prompt_format,
    }
    with whole_folder(output) as partial:
        write_prefix(partial, parameters, config, files=FORMS[form])
        for name in FORMS[form]:
            written = read_tensor_file(partial / name, "Is the disk in order?")
            _check_equal(output, {key.removeprefix(OFFICIAL_KEY): value for key, value in written.items()}, parameters)
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


def convert_adapter(source: Path, output: Path, model: Path) -> None:
    """Writes an adapter in PEFT's form with the names of this project, whatever code it was trained on.

    Args:
        source: an adapter of either kind.
        output: the new folder; written whole or not at all.
        model: folder of the base model; only its config.json is read.

    Raises:
        UserError: for an adapter that cannot be read or belongs to another base model.
        ComparisonError: what was written reads differently; nothing of it is left.
    """
    config = read_model_config(model)
    check_adapter(source, config)
    settings, tensors = read_adapter(source, config)
    found = read_adapter_config(source)
    with whole_folder(output) as partial:
        write_adapter(partial, settings, tensors)
        write_run(
            partial,
            base_model=found.base_model,
            prompt_format=found.prompt_format,
            quantization_bit=found.quantization_bit,
            base_fingerprint=found.base_fingerprint,
        )
        _check_equal(output, read_adapter(partial, config)[1], tensors)


def _check_equal(output: Path, found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """What was written, read again, is the same bit for bit."""
    if found.keys() != expected.keys() or any(not torch.equal(found[name], expected[name]) for name in expected):
        raise ComparisonError(f"{output}: the files, read again, are not what was written; is the disk in order?")


def _prefix_logits(model: Path, prefix: Path, probes: Sequence[Sequence[int]], device: str) -> list[torch.Tensor]:
    return probe_logits(load_model(model, pt_checkpoint=prefix, dtype=torch.float32, device=device), probes)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_FILE
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
