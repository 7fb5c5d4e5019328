"""From the flags of an entry point to a model that is ready to answer: which folders, which format, which device.

Shared by inference.py and evaluate.py. torch and transformers are imported where they are used: `--help` stays quick.
"""

import argparse
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.generation.errors import UsageError

REPOSITORY = Path(__file__).resolve().parents[2]
# Tried in this order when neither --model nor the checkpoint names a base model.
DEFAULT_MODELS = (REPOSITORY / "THUDM" / "chatglm3-6b", REPOSITORY / "THUDM" / "chatglm3-tiny")
PROMPT_FORMATS = ("multi-turn", "input-output")
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_PREFIX_FILE = "prefix_encoder.safetensors"


@dataclass(frozen=True)
class ModelChoice:
    """What the flags came to.

    Attributes:
        model: folder or hub name of the base or whole model.
        tokenizer: folder or hub name with `tokenizer.model`.
        prefix: folder of the prefix checkpoint.
        prompt_format: "multi-turn" or "input-output".
        device: for torch.
        notices: one line each, for the user: what was chosen and why, where that is not what the flags say.
    """

    model: str
    tokenizer: str
    prefix: Path | None
    prompt_format: str
    device: str
    notices: tuple[str, ...]


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a model, with upstream's names; each also with underscores."""
    add = parser.add_argument
    add(
        "--pt-checkpoint",
        "--pt_checkpoint",
        metavar="DIR",
        help="prefix checkpoint, or the --output_dir of a run (its newest checkpoint is used then)",
    )
    add(
        "--model",
        metavar="DIR",
        help="base model, or a fully fine-tuned one (default: the one that the checkpoint was trained on, "
        "else THUDM/chatglm3-6b, else THUDM/chatglm3-tiny)",
    )
    add("--tokenizer", metavar="DIR", help="folder with tokenizer.model (default: the same as --model)")
    add(
        "--pt-pre-seq-len",
        "--pt_pre_seq_len",
        type=int,
        metavar="N",
        help="check that the prefix has this length; the checkpoint knows its own",
    )
    add(
        "--format",
        choices=PROMPT_FORMATS,
        help="prompt format (default: the one that the checkpoint was trained with)",
    )
    add("--device", help="cuda, cuda:1, cpu … (default: cuda when there is a GPU, else cpu)")


def choose_model(arguments: argparse.Namespace) -> ModelChoice:
    """Turn the flags of `add_model_arguments` into folders, a prompt format and a device, before gigabytes are read.

    Raises:
        UsageError: a folder is missing or is of the wrong kind, or flags contradict the checkpoint.
        PrefixError: the prefix checkpoint cannot be read (a ValueError).
    """
    notices: list[str] = []
    prefix, config = None, None
    if arguments.pt_checkpoint is not None:
        from finetune_chatmodel_demo.chatglm3 import read_prefix_config

        prefix = find_prefix(arguments.pt_checkpoint, notices)
        config = read_prefix_config(prefix)
        wanted = arguments.pt_pre_seq_len
        if wanted is not None and wanted != config.pre_seq_len:
            raise UsageError(
                f"{prefix}: the prefix has {config.pre_seq_len} positions, --pt-pre-seq-len says {wanted}; "
                f"leave the flag out, or say {config.pre_seq_len}"
            )
    elif arguments.pt_pre_seq_len is not None:
        raise UsageError("--pt-pre-seq-len describes a prefix, but there is no --pt-checkpoint; add it")
    model = find_model(arguments.model, config, prefix, notices)
    recorded = config.prompt_format if config else _recorded_format(model)
    prompt_format = arguments.format or recorded
    if prompt_format is None:
        prompt_format = "multi-turn"
        if prefix is not None:
            notices.append(
                "the checkpoint does not say which prompt format it was trained with: "
                "multi-turn is assumed (--format input-output for the other one)"
            )
    elif recorded not in (None, prompt_format):
        notices.append(f"--format {prompt_format}, although the checkpoint was trained with {recorded}")
    return ModelChoice(
        model=model,
        tokenizer=_find_folder(arguments.tokenizer or model),
        prefix=prefix,
        prompt_format=prompt_format,
        device=choose_device(arguments.device, notices),
        notices=tuple(notices),
    )


def load_choice(choice: ModelChoice) -> tuple[Any, Any]:
    """Load what was chosen.

    Returns:
        (model in evaluation mode, tokenizer)

    Raises:
        OSError, ValueError: see `load_model` and `load_tokenizer`.
    """
    from finetune_chatmodel_demo.chatglm3 import load_model, load_tokenizer

    tokenizer = load_tokenizer(choice.tokenizer)
    model = load_model(choice.model, pt_checkpoint=choice.prefix, device=choice.device)
    if tokenizer.vocab_size > model.config.padded_vocab_size:
        raise UsageError(
            f"{choice.tokenizer}: the tokenizer has {tokenizer.vocab_size} ids, the model {choice.model} only "
            f"{model.config.padded_vocab_size}; use the tokenizer that belongs to the model"
        )
    return model, tokenizer


def find_prefix(path: str, notices: list[str]) -> Path:
    """Folder of a prefix: `path` itself, or the newest checkpoint-N in it.

    Raises:
        UsageError: there is none; says what the folder holds instead.
    """
    folder = Path(_find_folder(path))
    if not folder.is_dir():
        raise UsageError(f"--pt-checkpoint {path}: no such folder; give the --output_dir of the training run")
    if _holds_prefix(folder):
        return folder
    newest = _newest_checkpoint(folder, _holds_prefix)
    if newest is not None:
        notices.append(f"{folder} holds checkpoints: using the newest, {newest.name}")
        return newest
    if _holds_model(folder) or _newest_checkpoint(folder, _holds_model):
        raise UsageError(f"--pt-checkpoint {folder} holds a whole model, not a prefix; give it as --model")
    raise UsageError(
        f"--pt-checkpoint {folder} is not a prefix checkpoint: it holds {_list(folder)}, but neither {_PREFIX_FILE} "
        "nor pytorch_model.bin; has the training run saved one yet?"
    )


def find_model(path: str | None, config: Any, prefix: Path | None, notices: list[str]) -> str:
    """Folder or hub name of the model: what was asked for, else what the checkpoint records, else the default.

    Args:
        path: --model.
        config: the `PrefixConfig`, or None without a prefix.
        prefix: its folder.
        notices: lines for the user are added here.

    Raises:
        UsageError: there is no such model.
    """
    if path is not None:
        return _check_model(_find_folder(path), notices)
    if config is not None and config.base_model:
        recorded = config.base_model
        here = REPOSITORY / "THUDM" / Path(recorded.replace("\\", "/")).name
        for candidate in (Path(recorded), prefix / recorded, REPOSITORY / recorded, here):
            if candidate.is_dir():
                notices.append(f"base model: {candidate} (recorded in the checkpoint)")
                return _check_model(str(candidate), notices)
        raise UsageError(
            f"{prefix} was trained on {recorded}, which is not on this machine; say where it is with --model DIR "
            "(THUDM/README.md says how to get the official weights)"
        )
    for candidate in DEFAULT_MODELS:
        if candidate.is_dir():
            why = "the checkpoint names no base model" if prefix else "no --model was given"
            notices.append(f"model: {candidate} ({why})")
            return _check_model(str(candidate), notices)
    raise UsageError(f"no --model was given, and there is none at {' or '.join(map(str, DEFAULT_MODELS))}")


def choose_device(wanted: str | None, notices: list[str]) -> str:
    """The device to use: the GPU where there is one, else the CPU, which is said.

    Raises:
        UsageError: torch does not know such a device.
    """
    import torch

    device = wanted or "cuda"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise UsageError(f"--device {device} is unknown; use cuda, cuda:0, mps or cpu") from error
    if kind.type == "cuda":
        if not torch.cuda.is_available():
            notices.append("there is no GPU that torch can use: running on the CPU")
            return "cpu"
        if (kind.index or 0) >= torch.cuda.device_count():
            raise UsageError(f"--device {device}: this machine has {torch.cuda.device_count()} GPU(s), from cuda:0 on")
    elif kind.type == "mps" and not torch.backends.mps.is_available():
        notices.append("torch cannot use mps here: running on the CPU")
        return "cpu"
    return device


def _find_folder(path: str) -> str:
    """A folder as it was typed, or the same below the repository; what is neither may be a hub name."""
    for candidate in (Path(path).expanduser(), REPOSITORY / path):
        if candidate.is_dir():
            return str(candidate)
    return path


def _check_model(path: str, notices: list[str]) -> str:
    folder = Path(path)
    if not folder.is_dir() or _holds_model(folder):
        return path
    if _holds_prefix(folder):
        raise UsageError(f"--model {folder} is a prefix checkpoint; give it as --pt-checkpoint")
    newest = _newest_checkpoint(folder, _holds_model)
    if newest is not None:
        notices.append(f"{folder} holds checkpoints: using the newest, {newest.name}")
        return str(newest)
    if _newest_checkpoint(folder, _holds_prefix) is not None:
        raise UsageError(f"--model {folder} holds prefix checkpoints; give it as --pt-checkpoint")
    raise UsageError(
        f"--model {folder} holds no weights (found: {_list(folder)}); THUDM/README.md says how to get them"
    )


def _holds_prefix(folder: Path) -> bool:
    if (folder / _PREFIX_FILE).is_file():
        return True
    is_single_bin = (folder / "pytorch_model.bin").is_file() and not (folder / "model.safetensors").is_file()
    # The original demo writes a prefix of 7 MB for the 6B model under the name of whole models.
    return is_single_bin and (_read_config(folder).get("pre_seq_len") is not None or not _has_config(folder))


def _holds_model(folder: Path) -> bool:
    if not _has_config(folder) or _holds_prefix(folder):
        return False
    return any(next(folder.glob(name), None) for name in ("*.safetensors", "pytorch_model*.bin"))


def _has_config(folder: Path) -> bool:
    return (folder / "config.json").is_file()


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _recorded_format(model: str) -> str | None:
    """What a fully fine-tuned model was trained with, where its config.json says so."""
    recorded = _read_config(Path(model)).get("prompt_format")
    return recorded if recorded in PROMPT_FORMATS else None


def _newest_checkpoint(folder: Path, is_usable: Any) -> Path | None:
    steps = []
    for child in folder.iterdir():
        match = _CHECKPOINT.fullmatch(child.name)
        if match and child.is_dir() and is_usable(child):
            steps.append((int(match.group(1)), child))
    return max(steps)[1] if steps else None


def _list(folder: Path) -> str:
    return ", ".join(sorted(child.name for child in folder.iterdir())[:8]) or "nothing"
