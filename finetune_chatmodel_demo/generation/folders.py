"""What a folder holds (a model, a prefix, an adapter), told by its files alone, and which folder a name means.

Neither weights nor torch are loaded here.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.generation.errors import UsageError
from finetune_chatmodel_demo.generation.model_files import check_model_folder

REPOSITORY = Path(__file__).resolve().parents[2]
# Tried in this order when neither --model nor the checkpoint names a base model.
DEFAULT_MODELS = (REPOSITORY / "THUDM" / "chatglm3-6b", REPOSITORY / "THUDM" / "chatglm3-tiny")
PREFIX_FILE = "prefix_encoder.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
# Kind of checkpoint → its flag, and what it is called.
PREFIX, ADAPTER = "prefix", "adapter"
FLAGS = {PREFIX: "--pt-checkpoint", ADAPTER: "--adapter"}
TITLES = {PREFIX: "a prefix checkpoint", ADAPTER: "a LoRA adapter"}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")


def find_folder(path: str) -> str:
    """A folder as it was typed, or the same below the repository; what is neither may be a hub name."""
    for candidate in (Path(path).expanduser(), REPOSITORY / path):
        if candidate.is_dir():
            return str(candidate)
    return path


def find_checkpoint(path: str, flag: str, notices: list[str]) -> tuple[str, Path]:
    """The prefix or adapter that `path` means: the folder itself, or the newest checkpoint-N in it.

    Args:
        path: as it was typed.
        flag: the flag it was typed behind, for messages.
        notices: lines for the user are added here.

    Returns:
        (PREFIX or ADAPTER, folder)

    Raises:
        UsageError: there is neither; says what the folder holds instead.
    """
    folder = Path(find_folder(path))
    if not folder.is_dir():
        raise UsageError(f"{flag} {path}: no such folder; give the --output_dir of the training run")
    kind = kind_of_checkpoint(folder)
    if kind is not None:
        return kind, folder
    newest = newest_checkpoint(folder, lambda child: kind_of_checkpoint(child) is not None)
    if newest is not None:
        notices.append(f"{folder} holds checkpoints: using the newest, {newest.name}")
        return kind_of_checkpoint(newest), newest
    title = {"--pt-checkpoint": "prefix", "--adapter": "adapter"}[flag]
    if holds_model(folder) or newest_checkpoint(folder, holds_model):
        raise UsageError(f"{flag} {folder} holds a whole model, not {_article(title)}; give it as --model")
    raise UsageError(
        f"{flag} {folder} is not {TITLES[title]}: it holds {list_files(folder)}, but neither {PREFIX_FILE} nor "
        f"pytorch_model.bin nor {ADAPTER_CONFIG}; has the training run saved one yet?"
    )


def find_model(path: str | None, base_model: str | None, checkpoint: Path | None, notices: list[str]) -> str:
    """Folder or hub name of the model: what was asked for, else what the checkpoint records, else the default.

    Args:
        path: --model.
        base_model: what the checkpoint records.
        checkpoint: folder of the prefix or adapter, or None without one.
        notices: lines for the user are added here.

    Raises:
        UsageError: there is no such model.
    """
    if path is not None:
        return _check_model(find_folder(path), notices)
    if base_model:
        here = REPOSITORY / "THUDM" / Path(base_model.replace("\\", "/")).name
        for candidate in (Path(base_model), checkpoint / base_model, REPOSITORY / base_model, here):
            if candidate.is_dir():
                notices.append(f"base model: {candidate} (recorded in the checkpoint)")
                return _check_model(str(candidate), notices)
        raise UsageError(
            f"{checkpoint} was trained on {base_model}, which is not on this machine; say where it is with --model DIR "
            "(THUDM/README.md says how to get the official weights)"
        )
    for candidate in DEFAULT_MODELS:
        if candidate.is_dir():
            why = "the checkpoint names no base model" if checkpoint else "no --model was given"
            notices.append(f"model: {candidate} ({why})")
            return _check_model(str(candidate), notices)
    raise UsageError(f"no --model was given, and there is none at {' or '.join(map(str, DEFAULT_MODELS))}")


def _check_model(path: str, notices: list[str]) -> str:
    folder = Path(path)
    if not folder.is_dir() or holds_model(folder):
        check_model_folder(folder)
        return path
    kind = kind_of_checkpoint(folder)
    if kind is not None:
        raise UsageError(f"--model {folder} is {TITLES[kind]}; give it as {FLAGS[kind]}")
    newest = newest_checkpoint(folder, holds_model)
    if newest is not None:
        notices.append(f"{folder} holds checkpoints: using the newest, {newest.name}")
        return str(newest)
    newest = newest_checkpoint(folder, lambda child: kind_of_checkpoint(child) is not None)
    if newest is not None:
        kind = kind_of_checkpoint(newest)
        raise UsageError(f"--model {folder} holds {kind} checkpoints; give it as {FLAGS[kind]}")
    raise UsageError(
        f"--model {folder} holds no weights (found: {list_files(folder)}); THUDM/README.md says how to get them"
    )


def kind_of_checkpoint(folder: Path) -> str | None:
    """PREFIX, ADAPTER, or None for neither."""
    if (folder / ADAPTER_CONFIG).is_file():
        return ADAPTER
    return PREFIX if _holds_prefix(folder) else None


def holds_model(folder: Path) -> bool:
    """Whether there are a configuration and whole weights."""
    if not _has_config(folder) or kind_of_checkpoint(folder):
        return False
    return any(next(folder.glob(name), None) for name in ("*.safetensors", "pytorch_model*.bin"))


def is_reward_model(folder: Path) -> bool:
    """Whether a model folder's configuration is that of a reward model (stage rm)."""
    names = read_config(folder).get("architectures") or []
    return any("SequenceClassification" in str(name) for name in names)


def read_config(folder: Path) -> dict[str, Any]:
    """config.json, or {} where there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def newest_checkpoint(folder: Path, is_usable: Callable[[Path], Any]) -> Path | None:
    """The folder checkpoint-N of the largest N for which `is_usable` holds."""
    steps = []
    for child in folder.iterdir():
        match = _CHECKPOINT.fullmatch(child.name)
        if match and child.is_dir() and is_usable(child):
            steps.append((int(match.group(1)), child))
    return max(steps)[1] if steps else None


def list_files(folder: Path) -> str:
    """The first files of a folder, for messages."""
    return ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"


def _holds_prefix(folder: Path) -> bool:
    if (folder / PREFIX_FILE).is_file():
        return True
    is_single_bin = (folder / "pytorch_model.bin").is_file() and not (folder / "model.safetensors").is_file()
    # The original demo writes a prefix of 7 MB for the 6B model under the name of whole models.
    return is_single_bin and (read_config(folder).get("pre_seq_len") is not None or not _has_config(folder))


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _article(word: str) -> str:
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"
