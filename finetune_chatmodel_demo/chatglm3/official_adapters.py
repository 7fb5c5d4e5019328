"""LoRA adapters of the original ChatGLM code, read and written: the same numbers under other module names.

The original model has one linear module `query_key_value`; here there are three. An original adapter's A is shared by
all three and its B is cut into their rows. The other way, the A's of the three are stacked and their B's stand on the
diagonal of one B, which has the sum of their ranks; where the A's are equal, the original's smaller form comes back.
Both are exact. Exercise it with `pytest tests/test_adapters.py`.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from finetune_chatmodel_demo.chatglm3.adapter_files import AdapterError
from finetune_chatmodel_demo.chatglm3.configuration import ChatGLM3Config
from finetune_chatmodel_demo.chatglm3.weights import FUSED_MODULE, OFFICIAL_NAMES, SPLIT_MODULES, query_key_value_rows

PREFIX = "base_model.model."
LORA_A, LORA_B, MAGNITUDE = "lora_A.weight", "lora_B.weight", "lora_magnitude_vector"
# Starts that leave the base as it is. The others (PiSSA, OLoRA, LoftQ …) change it, each module in its own way.
PLAIN_STARTS = (True, False, "gaussian", "eva", "orthogonal", None)
# PEFT settings under which an adapter holds more than pairs of matrices, or belongs to a changed model.
OTHER_FEATURES = ("layer_replication", "target_parameters", "trainable_token_indices", "use_bdlora", "arrow_config")
_TENSOR = re.compile(r"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector)(?P<rest>.*)")
# query, key, value as the last part of a module's name.
SPLIT_NAMES = tuple(part.rpartition(".")[2] for part in SPLIT_MODULES)


@dataclass(frozen=True)
class LoraModule:
    """What an adapter holds for one linear module.

    Args:
        rank: rows of A.
        alpha: scale × rank (scale × √rank with rslora).
        tensors: by the end of their name: `lora_A.weight` (rank, in), `lora_B.weight` (out, rank), and with DoRA
            `lora_magnitude_vector` (out,).
    """

    rank: int
    alpha: float
    tensors: dict[str, torch.Tensor]


def has_official_names(tensors: Mapping[str, torch.Tensor]) -> bool:
    """Whether an adapter was trained on the original code."""
    return any(name.startswith(f"{PREFIX}transformer.") for name in tensors)


def to_own_names(
    settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], config: ChatGLM3Config
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An original adapter with the names of this project's model.

    Args:
        settings: adapter_config.json.
        tensors: by PEFT's names, `base_model.model.transformer.encoder.layers.0.….lora_A.weight`.
        config: of the base model; the rows of query, key and value follow from it.

    Returns:
        The settings and tensors of an adapter that computes the same.

    Raises:
        AdapterError: for features of PEFT that depend on how the modules are cut, or for other shapes.
    """
    modules, whole = read_modules(settings, tensors)
    result: dict[str, LoraModule] = {}
    for name, module in modules.items():
        own = _rename(name, to_own=True)
        if own.endswith(FUSED_MODULE):
            parts = _split(own, module, query_key_value_rows(config))
            result |= {own.removesuffix(FUSED_MODULE) + part: value for part, value in zip(SPLIT_MODULES, parts)}
        else:
            result[own] = module
    return _write_modules(settings, result, _rename_whole(settings, whole, to_own=True), config.num_layers)


def to_official_names(
    settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], config: ChatGLM3Config
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """An adapter of this project with the names and modules of the original code; the reverse of `to_own_names`.

    Raises:
        AdapterError: for what the original's fused module cannot hold.
    """
    modules, whole = read_modules(settings, tensors)
    result: dict[str, LoraModule] = {}
    for name, module in modules.items():
        block, _, part = name.rpartition(".self_attn.")
        if part in SPLIT_NAMES:
            fused = _rename(f"{block}.{FUSED_MODULE}", to_own=False)
            if fused not in result:
                parts = [modules.get(f"{block}.{part}") for part in SPLIT_MODULES]
                result[fused] = _join(fused, parts, query_key_value_rows(config), bool(settings.get("use_rslora")))
        else:
            result[_rename(name, to_own=False)] = module
    return _write_modules(settings, result, _rename_whole(settings, whole, to_own=False), config.num_layers)


def _split(name: str, module: LoraModule, rows: list[int]) -> list[LoraModule]:
    """query_key_value → query, key, value: A for each of them, rows of everything else."""
    for part, value in module.tensors.items():
        if part != LORA_A and value.shape[0] != sum(rows):
            raise AdapterError(
                f"{name}.{part} has {value.shape[0]} rows; this base model's query_key_value has {sum(rows)}. The "
                "adapter was trained for another base model"
            )
    cut = {part: value.split(rows) for part, value in module.tensors.items() if part != LORA_A}
    shared = module.tensors[LORA_A]
    return [
        LoraModule(
            module.rank, module.alpha, {LORA_A: shared} | {part: values[i].contiguous() for part, values in cut.items()}
        )
        for i in range(len(rows))
    ]


def _join(name: str, parts: list[LoraModule | None], rows: list[int], use_rslora: bool) -> LoraModule:
    """query, key, value (None: the adapter leaves it alone) → query_key_value, with the same product B·A·scale."""
    present = [part for part in parts if part is not None]
    kinds = {frozenset(part.tensors) for part in present}
    if len(kinds) > 1 or (len(present) < len(parts) and present[0].tensors.keys() - {LORA_A, LORA_B}):
        raise AdapterError(
            f"{name}: with DoRA or a bias, the original's one module needs all of {', '.join(SPLIT_NAMES)} in the "
            "adapter. Merge the adapter instead (--adapter without --to)"
        )
    first = present[0]
    scales = [lora_scale(part, use_rslora) for part in present]
    is_shared = all(
        torch.equal(part.tensors[LORA_A], first.tensors[LORA_A]) and scale == scales[0]
        for part, scale in zip(present, scales)
    )
    rank = first.rank if is_shared else sum(part.rank for part in present)
    fused_b = torch.zeros(sum(rows), rank, dtype=first.tensors[LORA_B].dtype)
    row = column = used = 0
    for part, height in zip(parts, rows):
        if part is not None:
            b = part.tensors[LORA_B] * (1 if is_shared else scales[used] / scales[0])
            fused_b[row : row + height, column : column + part.rank] = b
            column, used = column + (0 if is_shared else part.rank), used + 1
        row += height
    stacked = first.tensors[LORA_A] if is_shared else torch.cat([part.tensors[LORA_A] for part in present])
    others = {
        key: torch.cat([part.tensors[key] for part in present]) for key in first.tensors.keys() - {LORA_A, LORA_B}
    }
    alpha = scales[0] * (rank**0.5 if use_rslora else rank)
    return LoraModule(rank, round(alpha, 9), {LORA_A: stacked, LORA_B: fused_b} | others)


def lora_scale(module: LoraModule, use_rslora: bool) -> float:
    """The factor of B·A."""
    return module.alpha / (module.rank**0.5 if use_rslora else module.rank)


def read_modules(
    settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, LoraModule], dict[str, torch.Tensor]]:
    """The adapter by module names (without PEFT's prefix), and the tensors of modules that it holds whole."""
    _check_settings(settings)
    parts: dict[str, dict[str, torch.Tensor]] = {}
    whole: dict[str, torch.Tensor] = {}
    for name, value in tensors.items():
        match = _TENSOR.fullmatch(name.removeprefix(PREFIX))
        if match is None:
            whole[name.removeprefix(PREFIX)] = value
        else:
            parts.setdefault(match["module"], {})[match["part"] + match["rest"]] = value
    modules = {}
    for name, values in parts.items():
        if LORA_A not in values or LORA_B not in values:
            raise AdapterError(f"{name}: the adapter holds {', '.join(sorted(values))}; expected {LORA_A} and {LORA_B}")
        alpha = _pattern_value(settings.get("alpha_pattern"), name, settings["lora_alpha"])
        modules[name] = LoraModule(values[LORA_A].shape[0], alpha, values)
    return modules, whole


def _write_modules(
    settings: Mapping[str, Any], modules: dict[str, LoraModule], whole: dict[str, torch.Tensor], layers: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """PEFT's two files for `modules`; short names stand for a module of every layer."""
    tensors = {f"{PREFIX}{name}": value for name, value in whole.items()}
    groups: dict[str, list[str]] = {}
    for name, module in modules.items():
        tensors |= {f"{PREFIX}{name}.{part}": value.contiguous() for part, value in module.tensors.items()}
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    targets: list[str] = []
    ranks, alphas = {}, {}
    for short, names in groups.items():
        values = {(modules[name].rank, modules[name].alpha) for name in names}
        is_everywhere = len(names) == layers and len(values) == 1
        for label in [short] if is_everywhere else names:
            module = modules[names[0] if is_everywhere else label]
            targets.append(label)
            if module.rank != settings["r"]:
                ranks[label] = module.rank
            if module.alpha != settings["lora_alpha"]:
                alphas[label] = int(module.alpha) if module.alpha == int(module.alpha) else module.alpha
    result = dict(settings) | {
        "target_modules": sorted(targets),
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "modules_to_save": sorted({name.rpartition(".")[0].rpartition(".")[2] for name in whole}) or None,
        "task_type": "SEQ_CLS" if settings.get("task_type") == "SEQ_CLS" else "CAUSAL_LM",
        "auto_mapping": None,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
    }
    return result, tensors


def _check_settings(settings: Mapping[str, Any]) -> None:
    found = [f"{name}={settings[name]!r}" for name in OTHER_FEATURES if settings.get(name)]
    if settings.get("bias", "none") != "none":
        found.append(f"bias={settings['bias']!r}")
    if settings.get("init_lora_weights", True) not in PLAIN_STARTS:
        found.append(f"init_lora_weights={settings['init_lora_weights']!r}")
    if found:
        raise AdapterError(
            f"adapter_config.json says {', '.join(found)}: such an adapter depends on how the model's modules are cut, "
            "and cannot go over between the original code and this one. Merge it where it was trained"
        )


def _rename(name: str, *, to_own: bool) -> str:
    for official, own in OFFICIAL_NAMES.items():
        old, new = (official, own) if to_own else (own, official)
        name = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, name)
    return name


def _rename_whole(
    settings: Mapping[str, Any], whole: Mapping[str, torch.Tensor], *, to_own: bool
) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in whole.items():
        module, _, parameter = name.rpartition(".")
        if any(part in module for part in (FUSED_MODULE, *SPLIT_MODULES)):
            raise AdapterError(
                f"{name}: modules_to_save={settings.get('modules_to_save')} holds attention modules whole, which the "
                "original code and this one cut in different ways. Merge the adapter where it was trained"
            )
        renamed[f"{_rename(module, to_own=to_own)}.{parameter}"] = value
    return renamed


def _pattern_value(patterns: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first pattern that matches the end of a module's name."""
    matching: Iterator[Any] = (
        value for key, value in (patterns or {}).items() if re.fullmatch(rf"(.*\.)?({key})", name)
    )
    return next(matching, default)
