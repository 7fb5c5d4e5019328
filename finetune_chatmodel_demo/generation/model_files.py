"""What is wrong with a local model folder, told by its files before gigabytes are read: configuration, shards, sizes.

`check_download.py` looks closer; this is the part that every program can afford at its start.
"""

import json
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError

MODEL_TYPE = "chatglm"
WEIGHT_INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
POINTER_START = b"version https://git-lfs"
REPAIR = "download it again; THUDM/README.md says how, and `python THUDM/check_download.py` checks a folder"


def check_model_folder(folder: Path) -> None:
    """Refuses a local model folder that cannot be used, before gigabytes are read; other paths are left alone.

    Raises:
        UserError: config.json cannot be read or is of another architecture, a shard that the index names is missing,
            or a file of weights is cut.
    """
    if not (folder / "config.json").is_file():
        return
    check_architecture(folder / "config.json")
    for path in _weight_files(folder):
        _check_weights(path)


def check_architecture(path: Path) -> None:
    """Raises UserError for a config.json that cannot be read, or is another model's."""
    config = _read_mapping(path)
    found = config.get("model_type", MODEL_TYPE)
    if found != MODEL_TYPE:
        names = ", ".join(map(str, config.get("architectures") or [])) or "none are named"
        raise UserError(
            f"{path}: model_type is {found!r} (architectures: {names}), and only ChatGLM2 and ChatGLM3 "
            f"({MODEL_TYPE!r}) are loaded here; give the folder of such a model, or restore its config.json"
        )


def _weight_files(folder: Path) -> list[Path]:
    index = next((folder / name for name in WEIGHT_INDEXES if (folder / name).is_file()), None)
    if index is None or (folder / "model.safetensors").is_file():
        return sorted(folder.glob("*.safetensors"))
    shards = _read_mapping(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise UserError(f"{index} names no file of weights (no weight_map); {REPAIR}")
    paths = [folder / name for name in sorted({str(name) for name in shards.values()})]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks {len(missing)} of the {len(paths)} files that {index.name} names: {', '.join(missing)}; "
            f"{REPAIR}"
        )
    return paths


def _check_weights(path: Path) -> None:
    """Opens a file of weights; safetensors compares its header with the size."""
    from safetensors import SafetensorError, safe_open

    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(len(POINTER_START)) == POINTER_START:
            raise UserError(f"{path} is a git-lfs pointer of {size} bytes; run `git lfs pull` in {path.parent}")
    if path.suffix != ".safetensors":
        return
    try:
        with safe_open(path, framework="np"):
            pass
    except SafetensorError as error:
        raise UserError(f"{path} ({size:,} bytes) is not a whole safetensors file ({error}); {REPAIR}") from error


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {REPAIR}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__} and not a mapping; {REPAIR}")
    return content


def explain_load_error(path: str, error: Exception) -> str:
    """One line for what a loader says of a folder or a hub name; transformers takes several for an unreachable hub."""
    line = str(error).strip().partition("\n")[0]
    if isinstance(error, FileNotFoundError) or Path(path).is_dir():  # the loader's own words
        return line
    return f"{path}: there is no such folder, and as a name on the hub: {line}"
