r"""Command lines as they arrive from documents, chats and other systems: repaired with a notice, or diagnosed.

    --stage sft \ # comment        a backslash with something behind it: the shell dropped the lines below
    --output_dir saves\run         backslashes in paths, literal or eaten by the shell
    ——stage sft, --stage　sft      dashes and spaces of word processors and Chinese input methods
    src/train_bash.py --stage sft  another program's start

Exercise it with `pytest tests/test_command_line.py`.
"""

import os
import re
import unicodedata
from pathlib import Path

from finetune_chatmodel_demo.common.errors import UserError

DASHES = "-‐‑‒–—―−─━﹘﹣－ー"
QUOTES = {"“": "”", "‘": "’", "「": "」", "＂": "＂", "„": "“", "«": "»", "”": "”", "’": "’"}
WIDE_SPACES = "\u3000\u00a0\u2002\u2003\u2009\u202f"
_DASHES = re.escape(DASHES)
INVISIBLE = "\u200b\u200c\u200d\u2060\ufeff"
PATH_FLAGS = {
    "model_name_or_path",
    "ptuning_checkpoint",
    "adapter_name_or_path",
    "ref_model",
    "reward_model",
    "train_file",
    "validation_file",
    "dataset_dir",
    "output_dir",
    "deepspeed",
    "resume_from_checkpoint",
}
LIST_FLAGS = {
    "dataset",
    "eval_dataset",
    "interleave_probs",
    "lora_target",
    "additional_target",
    "freeze_trainable_modules",
    "freeze_extra_modules",
}
# Folders with which output paths begin, glued to what stood behind a backslash.
EATEN_OUTPUT = re.compile(r"saves(?=[A-Za-z0-9])|(outputs?|checkpoints?|models?)(?=[A-Z])|THUDM(?=\w)")
NUMBER = re.compile(rf"[{_DASHES}]?[\d.]+([eE][{_DASHES}]?\d+)?")
LAUNCHERS = re.compile(
    r"(python[\d.]*(\.exe)?|torchrun|xtuner|accelerate|deepspeed|launch|llamafactory-cli|lmf|train|sudo|nohup|"
    r"(.*[\\/])?(train_bash|train|finetune|main)\.py)"
)
OTHER_COMMANDS = {
    "export": "export.py writes a merged model",
    "chat": "inference.py talks with a model",
    "webchat": "inference.py talks with a model",
    "eval": "evaluate.py counts exact answers",
}


def repair_arguments(argv: list[str], known: set[str]) -> tuple[list[str], list[str]]:
    """Repairs what can be meant in one way only.

    Args:
        argv: the arguments of the process.
        known: names of flags, without dashes, with underscores.

    Returns:
        The arguments, and a notice for each kind of repair.

    Raises:
        UserError: where a part of the command is missing, or cannot be understood.
    """
    notices: list[str] = []
    argv = _strip_line_ends(argv, notices)
    argv = _strip_launcher(argv, notices)
    _find_broken_continuation(argv)
    argv = _repair_spaces(argv, notices)
    argv = _repair_dashes(argv, known, notices)
    return _repair_quotes(argv, notices), notices


def describe_lost_lines(given: dict[str, object]) -> str:
    """What else may be wrong where a run lacks its most important flags: a comment in front of a backslash, which the
    shell takes away together with it, leaves no other trace."""
    if not given or given.get("model_name_or_path") or given.get("output_dir") or given.get("replay"):
        return ""
    return (
        ". Neither --model_name_or_path nor --output_dir arrived: in a command of several lines each but the last must "
        "end with a backslash, and no comment may stand in a line"
    )


def repair_values(name: str, values: list[str], notices: list[str]) -> list[str]:
    """Repairs the values of one flag: paths, lists with Chinese commas, numbers with a typographic minus.

    Args:
        name: the flag, without dashes, with underscores.
        values: what follows it.
        notices: a notice is appended for each repair.

    Raises:
        UserError: for a path that lost its backslashes where the real one is there.
    """
    if name in PATH_FLAGS:
        return [_repair_path(name, value, notices) for value in values]
    if name in LIST_FLAGS:
        return [re.sub(r"\s*[,，、﹐]\s*", ",", value) for value in values]
    return [re.sub(f"[{_DASHES}]", "-", value) if NUMBER.fullmatch(value) else value for value in values]


def _strip_line_ends(argv: list[str], notices: list[str]) -> list[str]:
    if "\r" in argv:
        place = _name_place(argv, argv.index("\r"))
        raise UserError(
            f"{place}: the script has Windows line ends (\\r), so that no backslash is the last character of its line, "
            "and the lines below never arrived; convert it: sed -i 's/\\r$//' SCRIPT.sh"
        )
    if any(item.endswith("\r") for item in argv):
        notices.append("Windows line ends (\\r) behind values are left out; sed -i 's/\\r$//' SCRIPT.sh removes them")
    return [item.rstrip("\r") for item in argv]


def _strip_launcher(argv: list[str], notices: list[str]) -> list[str]:
    """Leaves out the start of another command line that was pasted as a whole."""
    count = 0
    while count < len(argv) and (LAUNCHERS.fullmatch(argv[count]) or re.fullmatch(r"[A-Z_]+=\S*", argv[count])):
        count += 1
    start, rest = argv[:count], argv[count:]
    if start and any(word.endswith(("llamafactory-cli", "lmf")) for word in start) and rest[:1]:
        advice = OTHER_COMMANDS.get(rest[0])
        if advice:
            raise UserError(f"{start[-1]} {rest[0]}: this program trains; {advice}")
    if rest[:1] and rest[0].endswith(".py"):
        raise UserError(
            f"{rest[0]} is a Python file; a run is a YAML or JSON file here, e.g. "
            "finetune_chatmodel_demo/configs/qlora_oasst1.yaml, or flags"
        )
    if start:
        notices.append(f"{' '.join(start)!r} at the start is left out: this is the program already")
        variables = [word for word in start if "=" in word]
        if variables:
            notices.append(f"{' '.join(variables)} is not set: variables belong in front of python")
    return rest


def _find_broken_continuation(argv: list[str]) -> None:
    """A backslash that is followed by a blank arrives as a blank, and the shell ends the command at that line.

    Raises:
        UserError: says where.
    """
    for index, item in enumerate(argv):
        is_blank = bool(item) and not item.strip(" \t")
        if item in ("\\", "^", "`"):
            why = f"{item!r} arrived as an argument: something stands behind it, or this shell does not continue lines "
            why += "with it (bash does so with a backslash, cmd.exe with ^, PowerShell with `)"
        elif is_blank or item == "#" or re.match(r"\\?\s+#|\\#", item):
            why = "a backslash must be the last character of its line, and "
            why += "a comment" if "#" in item else "a blank"
            why += " follows it here, so that the shell ended the command there"
        else:
            continue
        if not any(other.startswith("--") for other in argv[index:]):
            why += " and the lines below it never arrived"
        raise UserError(
            f"{_name_place(argv, index)}: {why}. Remove what stands behind the backslashes, and put comments above the "
            "command"
        )


def _name_place(argv: list[str], index: int) -> str:
    """`line 2 of the command (--stage sft)`: one flag a line is what such commands look like."""
    flags = [position for position, item in enumerate(argv[:index]) if item.startswith("-")]
    if not flags:
        return "line 1 of the command"
    return f"line {len(flags) + 1} of the command, if each flag has its line ({' '.join(argv[flags[-1] : index])})"


def _repair_spaces(argv: list[str], notices: list[str]) -> list[str]:
    """Splits flags at spaces that are none for the shell, and drops characters that cannot be seen."""
    result: list[str] = []
    for item in argv:
        clean = item.translate(dict.fromkeys(map(ord, INVISIBLE))).strip(WIDE_SPACES)
        if re.match(rf"\s+[{_DASHES}]", clean):  # a flag behind a backslash with a blank
            clean = clean.lstrip()
        parts = [clean] if clean or not item else []
        if re.match(rf"[{_DASHES}]+[A-Za-z]", clean) or re.search(rf"[{WIDE_SPACES}][{_DASHES}]+[A-Za-z]", clean):
            parts = re.split(rf"[{WIDE_SPACES}]+", clean)
        if parts != [item]:
            notices.append(f"{item!r} holds spaces that the shell does not know: it is read as {' '.join(parts)!r}")
        result += parts
    return result


def _repair_dashes(argv: list[str], known: set[str], notices: list[str]) -> list[str]:
    """`——stage`, `－－stage`, `–stage`, `-stage` → `--stage`."""
    result = []
    for item in argv:
        match = re.fullmatch(rf"([{_DASHES}]+)([\w{_DASHES}]+)(=.*)?", item, re.DOTALL)
        is_plain = item.startswith("--") and item.partition("=")[0].isascii()
        if match and not is_plain:
            name = re.sub(f"[{_DASHES}]", "_", unicodedata.normalize("NFKC", match[2]))
            if name in known or (len(match[1]) > 1 and not match[1].isascii()):
                notices.append(f"{item!r} is read as --{name}: flags begin with two plain dashes")
                item = f"--{name}{match[3] or ''}"
        result.append(item)
    return result


def _repair_quotes(argv: list[str], notices: list[str]) -> list[str]:
    result = []
    for item in argv:
        head, equals, value = item.partition("=") if item.startswith("--") else ("", "", item)
        closing = QUOTES.get(value[:1])
        if closing and len(value) > 1 and value[-1] in (closing, value[0]):
            notices.append(f"{item!r}: quotation marks of a word processor are left out")
            item = head + equals + value[1:-1]
        elif closing:
            raise UserError(
                f"{item!r} begins with the quotation mark {value[0]}, which the shell does not know; use \" or '"
            )
        result.append(item)
    return result


def _repair_path(name: str, value: str, notices: list[str]) -> str:
    if os.name == "nt":
        return value
    if "\\" in value and not Path(value).exists() and not value.startswith("{"):
        slashes = re.sub(r"\\+", "/", value)
        notices.append(f"--{name} {value}: backslashes are read as slashes, {slashes}")
        return slashes
    if "/" in value or Path(value).exists():
        return value
    if name == "output_dir":
        if EATEN_OUTPUT.match(value):
            notices.append(
                f"--output_dir is {value}: if there were backslashes in it, the shell has eaten them; write slashes "
                "(saves/ChatGLM3-6B/lora)"
            )
        return value
    meant = find_eaten_path(value)
    if meant is not None:
        raise UserError(
            f"--{name} {value} does not exist, but {meant.as_posix()} does: the shell has eaten the backslashes; write "
            "slashes"
        )
    return value


def find_eaten_path(value: str, folder: Path | None = None) -> Path | None:
    """The existing path below `folder` (default: the current one) whose parts, glued together, are `value`."""
    here = folder or Path()
    try:
        entries = sorted(here.iterdir())
    except OSError:
        return None
    for entry in entries:
        if entry.name == value and folder is not None:
            return entry
        if value.startswith(entry.name) and entry.name != value and entry.is_dir():
            found = find_eaten_path(value[len(entry.name) :], entry)
            if found is not None:
                return found
    return None
