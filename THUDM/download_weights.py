"""Checks of the weights in a download: the index, every shard, and both against the configuration.

Used by check_download.py; reads headers and tables of contents only.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.common.files import format_size
from THUDM.download_files import FAIL, NOTE, OK, DamagedFileError, Report, Tensor, is_present, read_weights

# In the order in which transformers looks for them.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
OPTIONAL_TENSORS = {"transformer.rotary_pos_emb.inv_freq"}


def check_weights(folder: Path, config: dict[str, Any] | None, report: Report) -> list[Path]:
    """Are the weights there that transformers would load, and whole? Returns the whole files."""
    entries = [name for name in WEIGHTS if (folder / name).exists()]
    if not entries:
        there = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        report.add(FAIL, "weights", f"none of {', '.join(WEIGHTS)} is there (found: {there}); download them")
        return []
    before = len(report.findings)
    whole = check_weight_set(folder, entries[0], config, report)
    if all(finding.status != FAIL for finding in report.findings[before:]):
        return whole
    for other in entries[1:]:
        trial = Report(folder)
        check_weight_set(folder, other, config, trial)
        if trial.is_usable:
            report.add(NOTE, other, f"these weights are whole, and used as soon as {entries[0]} is deleted")
    return whole


def check_weight_set(folder: Path, entry: str, config: dict[str, Any] | None, report: Report) -> list[Path]:
    """Checks one file, or an index and its shards; returns the whole files."""
    index = None
    files = [entry]
    if entry.endswith(".json"):
        if not is_present(folder / entry, report) or (index := read_index(folder / entry, report)) is None:
            return []
        files = sorted(set(index["weight_map"].values()))
    shards = {name: tensors for name in files if (tensors := check_shard(folder / name, report)) is not None}
    if len(shards) < len(files):
        check_space(folder, list(shards), index, report)
    else:
        check_against_index(shards, index, report)
        if config is not None:
            check_against_config(shards, config, report)
    return [folder / name for name in shards]


def read_index(path: Path, report: Report) -> dict[str, Any] | None:
    """The index of sharded weights, or None after reporting what is wrong with it."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        shards = sorted(set(index["weight_map"].values()))
        total = index.get("metadata", {}).get("total_size")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        report.add(FAIL, path.name, f"it is no index of weights ({error!r}); download it again")
        return None
    size = format_size(total) if isinstance(total, int) else "size unknown"
    report.add(OK, path.name, f"{len(index['weight_map'])} tensors in {len(shards)} shards, {size}")
    return index


def check_shard(path: Path, report: Report) -> dict[str, Tensor] | None:
    """The tensors of a weights file, or None after reporting why it cannot be used."""
    if not is_present(path, report):
        return None
    try:
        tensors = read_weights(path)
    except DamagedFileError as error:
        report.add(FAIL, path.name, f"{error}; delete the file and download it again")
        return None
    report.add(OK, path.name, f"whole, {path.stat().st_size:,} bytes, {len(tensors)} tensors")
    return tensors


def check_against_index(shards: dict[str, dict[str, Tensor]], index: dict[str, Any] | None, report: Report) -> None:
    """Does every shard hold the tensors that the index sends there, and are they as many bytes?"""
    if index is None:
        return
    strayed = [name for name, shard in index["weight_map"].items() if name not in shards[shard]]
    if strayed:
        where = f"{strayed[0]} is not in {index['weight_map'][strayed[0]]}"
        report.add(FAIL, "index", f"{len(strayed)} tensors are elsewhere ({where}): several downloads are mixed")
    total = sum(tensor.size for tensors in shards.values() for tensor in tensors.values())
    wanted = index.get("metadata", {}).get("total_size")
    if isinstance(wanted, int):
        status = OK if total == wanted else FAIL if total < wanted else NOTE
        report.add(status, "size", f"{total:,} bytes of tensors, the index says {wanted:,}")


def check_against_config(shards: dict[str, dict[str, Tensor]], config: dict[str, Any], report: Report) -> None:
    """Are these the tensors, in the shapes, of the model that config.json describes?"""
    shapes = {name: tensor.shape for tensors in shards.values() for name, tensor in tensors.items()}
    expected = expected_shapes(config)
    missing = [name for name in expected if name not in shapes]
    misshapen = [name for name in expected if name in shapes and shapes[name] != expected[name]]
    unknown = [name for name in shapes if name not in expected and name not in OPTIONAL_TENSORS]
    if missing:
        example = f"{len(missing)} of {len(expected)} are missing ({missing[0]})"
        report.add(FAIL, "tensors", f"{example}: the weights and config.json are of different models")
    if misshapen:
        name = misshapen[0]
        example = f"{name} is {shapes[name]}, config.json says {expected[name]}"
        report.add(FAIL, "tensors", f"{len(misshapen)} have another shape ({example})")
    if unknown:
        report.add(NOTE, "tensors", f"{len(unknown)} are not part of a ChatGLM3 ({', '.join(unknown[:3])})")
    if not missing and not misshapen:
        report.add(OK, "tensors", f"all {len(expected)}, in the shapes that config.json says")


def expected_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the official layout, from the configuration."""
    hidden, ffn, channels = config["hidden_size"], config["ffn_hidden_size"], config["kv_channels"]
    heads = config["num_attention_heads"]
    groups = config["multi_query_group_num"] if config.get("multi_query_attention", True) else heads
    fused = (heads + 2 * groups) * channels
    vocabulary = (config["padded_vocab_size"], hidden)
    shapes: dict[str, tuple[int, ...]] = {"transformer.embedding.word_embeddings.weight": vocabulary}
    for layer in range(config["num_layers"]):
        start = f"transformer.encoder.layers.{layer}."
        shapes[start + "input_layernorm.weight"] = (hidden,)
        shapes[start + "self_attention.query_key_value.weight"] = (fused, hidden)
        if config.get("add_qkv_bias", True):
            shapes[start + "self_attention.query_key_value.bias"] = (fused,)
        shapes[start + "self_attention.dense.weight"] = (hidden, heads * channels)
        shapes[start + "post_attention_layernorm.weight"] = (hidden,)
        shapes[start + "mlp.dense_h_to_4h.weight"] = (2 * ffn, hidden)
        shapes[start + "mlp.dense_4h_to_h.weight"] = (hidden, ffn)
    shapes["transformer.encoder.final_layernorm.weight"] = (hidden,)
    shapes["transformer.output_layer.weight"] = vocabulary
    return shapes


def check_space(folder: Path, present: list[str], index: dict[str, Any] | None, report: Report) -> None:
    """Does what is still to come fit on the disk?"""
    total = (index or {}).get("metadata", {}).get("total_size")
    if not isinstance(total, int):
        return
    needed = max(total - sum((folder / name).stat().st_size for name in present), 0)
    free = shutil.disk_usage(folder).free
    status, advice = (OK, "") if free >= needed else (FAIL, "; make room first")
    report.add(status, "disk", f"{format_size(needed)} are still to come, {format_size(free)} are free{advice}")
