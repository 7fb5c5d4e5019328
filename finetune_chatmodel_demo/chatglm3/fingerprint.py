"""Which base a prefix or an adapter was trained on: a few numbers of its weights, stored with the result.

Another base of the same shape loads without an error and answers nonsense. A fingerprint is four numbers of each of a
few weight matrices, read from their files in milliseconds, for a model of gigabytes too. They are compared up to what
rounding to bfloat16 changes, so that the same model in another dtype is the same base.
"""

import re
from pathlib import Path

import torch
from safetensors import safe_open

from finetune_chatmodel_demo.chatglm3.model_folder import weight_files
from finetune_chatmodel_demo.chatglm3.weights import read_pickle
from finetune_chatmodel_demo.common.errors import UserError

Fingerprint = dict[str, list[float]]
POINTS = 4  # of each matrix, spread over its rows and columns
ROUNDING, SMALLEST = 2.0**-7, 1e-7  # two roundings to bfloat16, and float16's least steps
_MATRIX = re.compile(r"(word_embeddings|query_key_value|dense|dense_h_to_4h|dense_4h_to_h|output_layer)\.weight")
_LAYER = re.compile(r"\blayers\.(\d+)\.")


def read_fingerprint(model: str | Path | None) -> Fingerprint | None:
    """The fingerprint of a model folder; None for a hub name, or where there are no weights in the official layout."""
    if model is None or not (Path(model) / "config.json").is_file():
        return None
    places = {name: file for file in weight_files(Path(model)) for name in _names_of(file)}
    layers = sorted({int(match[1]) for name in places if (match := _LAYER.search(name))})
    chosen = {layers[0], layers[len(layers) // 2], layers[-1]} if layers else set()
    found: Fingerprint = {}
    for name, file in sorted(places.items()):
        layer = _LAYER.search(name)
        if _MATRIX.search(name) and (layer is None or int(layer[1]) in chosen):
            found |= _read_points(file, name)
    return found or None


def check_base(
    checkpoint: Path, recorded: Fingerprint | None, base_model: str | None, model: str | Path, *, allow_other: bool
) -> str | None:
    """Refuses a base that a prefix or adapter was not trained on.

    Args:
        checkpoint: folder of the prefix or adapter.
        recorded: its fingerprint of the base; None: an old result, or one of another program.
        base_model: the name of the base that it records.
        model: the base that is to be used.
        allow_other: whether another base is meant.

    Returns:
        A line for the user where the base is another one, or cannot be told; else None.

    Raises:
        UserError: for another base, unless it is meant.
    """
    found = read_fingerprint(model)
    if not isinstance(recorded, dict):
        return f"{checkpoint} does not record what its base looked like; it names {base_model or 'none'}, used: {model}"
    names = sorted(recorded.keys() & (found or {}).keys())
    if not names:
        return f"whether {model} is the base of {checkpoint} cannot be told: there are no weights to compare"
    other = next((name for name in names if not _is_same(recorded[name], found[name])), None)
    if other is None:
        return None
    message = f"{checkpoint} was trained on another base model than {model}: {other} differs (recorded: {base_model})"
    if not allow_other:
        raise UserError(f"{message}. Give its own base model, or --allow_other_base if this one is meant")
    return message


def _is_same(first: list[float], second: list[float]) -> bool:
    return len(first) == len(second) and all(
        abs(a - b) <= ROUNDING * max(abs(a), abs(b)) + SMALLEST for a, b in zip(first, second)
    )


def _names_of(file: Path) -> list[str]:
    if file.suffix != ".safetensors":
        return list(read_pickle(file, "Copy it again.", map_location="meta"))
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _read_points(file: Path, name: str) -> Fingerprint:
    """A few numbers of one matrix; {} where it is quantized."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice(name)
            rows = [part[row : row + 1][0] for row in _spread(part.get_shape()[0])]
    else:
        matrix = read_pickle(file, "Copy it again.", is_mapped=True)[name]
        rows = [matrix[row] for row in _spread(len(matrix))]
    if not rows or not all(row.is_floating_point() and row.dim() == 1 for row in rows):
        return {}
    points = torch.stack([row[column] for row, column in zip(rows, _spread(rows[0].numel()))])
    return {name: [round(value, 9) for value in points.float().tolist()]}


def _spread(length: int) -> list[int]:
    return [i * (length - 1) // (POINTS - 1) for i in range(POINTS)]
