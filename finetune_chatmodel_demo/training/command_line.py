"""finetune.py's command line: the original demo's flags, all of `TrainingArguments`, or one JSON/YAML file.

    python finetune_chatmodel_demo/finetune.py --help

Only what was given is returned, so that `deciding` can choose the defaults by method and by device. Texts are never
altered. Nothing here imports torch.
"""

import argparse
import difflib
import json
import os
import re
from pathlib import Path
from typing import Any

from finetune_chatmodel_demo.common.errors import UserError, did_you_mean
from finetune_chatmodel_demo.common.flags import add_fields, parse_bool
from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.training.arguments import (
    GenerationArguments,
    MethodArguments,
    ModelArguments,
    RunArguments,
    StageArguments,
)
from finetune_chatmodel_demo.training.demo_files import is_demo_file, translate_demo_file
from finetune_chatmodel_demo.training.foreign_flags import translate_flag
from finetune_chatmodel_demo.training.trainer_flags import read_trainer_arguments

# transformers 5.23 renamed the first to the second.
CHECKPOINTING_FLAGS = ("gradient_checkpointing", "activation_checkpointing")
CONFIG_FILE_ENDINGS = (".json", ".yaml", ".yml")
FLAG = re.compile(r"--[A-Za-z][A-Za-z0-9_-]*")
PATH_FLAGS = {
    *("model_name_or_path", "ptuning_checkpoint", "adapter_name_or_path", "ref_model", "reward_model", "deepspeed"),
    *("train_file", "validation_file", "dataset_dir", "output_dir", "resume_from_checkpoint", "tokenized_cache"),
}
# Title in --help → the flags below it.
OWN_ARGUMENTS = {
    "model": ModelArguments,
    "method": MethodArguments,
    "stage": StageArguments,
    "data": DataArguments,
    "generated answers": GenerationArguments,
    "run": RunArguments,
}

COMMON_TRAINER_FLAGS = """\
the flags of transformers' TrainingArguments that are used most (--help_all lists every one):
  --do_train --do_eval --do_predict  without any of them a run trains; without --do_train nothing is trained
  --output_dir DIR                   where checkpoints, logs, curves, predictions and the result go
  --learning_rate LR                 default for sft: 2e-2 for ptuning, 1e-4 for lora, freeze and full
  --lr_scheduler_type NAME           linear (default), cosine, cosine_with_restarts, polynomial, constant,
                                     constant_with_warmup, inverse_sqrt, reduce_lr_on_plateau
  --lr_scheduler_kwargs JSON         its options, e.g. '{"num_cycles": 3}'
  --max_grad_norm X                  longer gradients are cut (default 1.0)
  --per_device_train_batch_size N    rows of a batch on each device
  --gradient_accumulation_steps N    batches of an optimizer step
  --max_steps N | --num_train_epochs N
  --warmup_steps N                   steps, or a share below 1 (default 0.03)
  --save_steps N --save_total_limit N --logging_steps N (default 10)
  --eval_strategy steps|epoch --eval_steps N
                                     with validation data (default: at each checkpoint)
  --resume_from_checkpoint True|DIR  True: the newest whole checkpoint in --output_dir
  --bf16 / --fp16                    default: bf16 where the hardware has it, float32 on a CPU
  --gradient_checkpointing none|mlp|full
                                     activations that are computed twice to save memory; default: full on a GPU
  --torch_compile True               fuses norms and SwiGLU; the first steps wait for the compiler (default: off)
  --train_sampling_strategy NAME     default: group_by_length
  --deepspeed FILE                   e.g. finetune_chatmodel_demo/configs/ds_zero2.json (all parameters)
  --seed N"""


class _Parser(argparse.ArgumentParser):
    """Mistakes are `UserError`s, and a word that is none of the choices gets a suggestion."""

    def error(self, message: str) -> None:
        match = re.match(r"argument (--\w+): invalid choice: '?([^' ]+)", message)
        if match:
            choices = [str(c) for action in self._actions if match[1] in action.option_strings for c in action.choices]
            near = difflib.get_close_matches(match[2].lower(), choices, n=1, cutoff=0.5)
            message += f"; did you mean {near[0]}?" if near else ""
        raise UserError(message)


def build_parser(*, with_trainer: bool = True) -> argparse.ArgumentParser:
    """Returns a parser of all flags, or of this project's own, that leaves out of its result what was not given."""
    parser = _Parser(
        prog="finetune.py",
        usage="finetune.py [SETTINGS.json|SETTINGS.yaml | DATA_DIR MODEL SETTINGS.yaml [yes|no|N]] [--flag value ...]",
        description="Fine-tunes a ChatGLM3: --stage says from what it learns, --finetuning_type what is trained. "
        "Examples of settings files are in finetune_chatmodel_demo/configs.",
        epilog=None if with_trainer else COMMON_TRAINER_FLAGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    for title, arguments in OWN_ARGUMENTS.items():
        add_fields(parser.add_argument_group(title), arguments)
    if with_trainer:
        add_fields(parser.add_argument_group("transformers' TrainingArguments"), read_trainer_arguments())
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        if action.dest in CHECKPOINTING_FLAGS:
            action.type, action.metavar = read_checkpointing, "none|mlp|full"
    return parser


def read_checkpointing(value: str) -> bool | str:
    """--gradient_checkpointing: transformers' True and False, or a policy; "mlp" stays a word."""
    named = {"none": False, "full": True, "mlp": "mlp"}
    try:
        return named[value] if value in named else parse_bool(value)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is none of none, mlp, full (or False, True)") from error


def parse_given(argv: list[str]) -> tuple[dict[str, Any], list[str]]:
    """Parses the command line.

    Args:
        argv: flags; a JSON or YAML file may stand first (alone, as in the original demo, or with flags that
            override it).

    Returns:
        The options that were given, converted to their types, and notices about what has no effect.

    Raises:
        UserError: for an unknown flag, a value that cannot be converted, or a command line that arrived damaged.
    """
    find_broken_line(argv)
    argv = _read_positional(argv)
    parser = build_parser()
    known = {action.dest: action for action in parser._actions}
    notices: list[str] = []
    arguments: list[str] = []
    for name, values in _split_flags(argv):
        arguments += _write_flag(name, values, known, notices) if name else values
    options, unknown = parser.parse_known_args(arguments)
    if unknown:
        raise UserError(_describe_unknown(unknown[0], list(known)))
    return vars(options), notices


def _read_positional(argv: list[str]) -> list[str]:
    """Replaces what stands in front of the flags: a settings file, or the later official demo's DATA_DIR MODEL FILE
    [yes|no|checkpoint]."""
    count = next((index for index, item in enumerate(argv) if item.startswith("-")), len(argv))
    words, rest = argv[:count], argv[count:]
    if len(words) == 1 and words[0].endswith(CONFIG_FILE_ENDINGS):
        return _flags_of_file(_read_path(words[0], "the settings file", [])) + rest
    if len(words) not in (3, 4) or not words[2].endswith(CONFIG_FILE_ENDINGS):
        return argv
    data_dir, model, file = (_read_path(word, "", []) for word in words[:3])
    if not Path(data_dir).is_dir():
        raise UserError(f"{data_dir} is not a folder; the three words are DATA_DIR MODEL SETTINGS.yaml")
    flags = [*_flags_of_file(file, data_dir), f"--model_name_or_path={model}"]
    resume = words[3].lower() if len(words) == 4 else "no"
    if resume.isdigit():
        output = next((flag.partition("=")[2] for flag in flags if flag.startswith("--output_dir=")), "output")
        flags.append(f"--resume_from_checkpoint={Path(output) / f'checkpoint-{resume}'}")
    elif resume == "yes":
        flags.append("--resume_from_checkpoint=True")
    elif resume not in ("no", ""):
        raise UserError(f"{words[3]!r} behind {file} is none of yes, no, or the number of a checkpoint")
    return flags + rest


def _split_flags(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Groups arguments by flag: `--pre-seq-len 1 --b=2` becomes [("pre_seq_len", ["1"]), ("b", ["2"])].

    What stands in front of the first flag has the name "".
    """
    groups: list[tuple[str, list[str]]] = [("", [])]
    for item in argv:
        flag, equals, value = item.partition("=")
        if FLAG.fullmatch(flag):
            groups.append((flag[2:].replace("-", "_"), [value] if equals else []))
        else:
            groups[-1][1].append(item)
    return groups


def _write_flag(name: str, values: list[str], known: dict[str, argparse.Action], notices: list[str]) -> list[str]:
    """One flag as the parser knows it; notices are added where it has no effect."""
    translated = translate_flag(name, values)
    if isinstance(translated, str):
        notices.append(translated)
        return []
    name, values = translated
    if name.startswith("no_") and name[3:] in known and not values:
        name, values = name[3:], ["False"]
    if name in PATH_FLAGS:
        values = [str(_read_path(value, f"--{name}", notices)) for value in values]
    # In one word, a value that begins with a dash is none the less a value.
    return [f"--{name}={values[0]}"] if len(values) == 1 else [f"--{name}", *values]


def _read_path(value: str, what: str, notices: list[str]) -> str:
    """A path; one that was written with backslashes is read on every system."""
    if "\\" not in value or os.name == "nt" or value.startswith("{") or Path(value).exists():
        return value
    slashes = re.sub(r"\\+", "/", value)
    notices.append(f"{what} {value}: backslashes are read as slashes, {slashes}")
    return slashes


def _flags_of_file(path: str, data_dir: str | None = None) -> list[str]:
    """Reads a settings file as flags, so that both ways in have the same names, types and errors.

    (YAML reads `2e-2` as text, for instance; as a flag's value it is a number.)
    """
    if not Path(path).is_file():
        raise UserError(f"the settings file {path} does not exist (the current folder is {Path.cwd()})")
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        settings = json.loads(text) if path.endswith(".json") else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"the settings file {path} cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds a {type(settings).__name__}; write one mapping of flag names to values")
    if is_demo_file(settings):
        settings = translate_demo_file(settings, data_dir)
    flags: list[str] = []
    for name, value in settings.items():
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        elif value is not None:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def find_broken_line(argv: list[str]) -> None:
    """Looks for what the shell hands over where a command of several lines is broken.

    Raises:
        UserError: says where, and how to write it.
    """
    for index, item in enumerate(argv):
        if item.endswith("\r"):
            why = "the script has Windows line ends (\\r); convert it: sed -i 's/\\r$//' SCRIPT.sh"
        elif item in ("\\", "^", "`"):
            why = f"{item!r} arrived as an argument: something stands behind it, or this shell does not continue lines "
            why += "with it (bash does so with a backslash, cmd.exe with ^, PowerShell with `)"
        elif re.fullmatch(r"[ \t]+(--\w+)?|\s*\\?\s*#", item):
            why = "a backslash must be the last character of its line, and "
            why += "a comment" if "#" in item else "a blank"
            why += " follows it here. Remove what stands behind the backslashes, and put comments above the command"
        else:
            continue
        if not any(FLAG.match(other) for other in argv[index + 1 :]):
            why += "; the lines below it never arrived"
        flags = [position for position, other in enumerate(argv[:index]) if FLAG.match(other)]
        behind = f" ({' '.join(argv[flags[-1] : index])})" if flags else ""
        raise UserError(f"line {len(flags) + 1} of the command, if each flag has its line{behind}: {why}")


def describe_lost_lines(given: dict[str, Any]) -> str:
    """What else may be wrong where a run lacks its most important flags: a comment in front of a backslash, which the
    shell takes away together with it, leaves no other trace."""
    if not given or given.get("model_name_or_path") or given.get("output_dir") or given.get("replay"):
        return ""
    return (
        ". Neither --model_name_or_path nor --output_dir arrived: in a command of several lines each but the last must "
        "end with a backslash, and no comment may stand in a line"
    )


def _describe_unknown(argument: str, known: list[str]) -> str:
    name = argument.partition("=")[0]
    if name.endswith(".py"):
        hint = "; this program is finetune.py already: a run is flags, or a YAML or JSON file"
    elif name.startswith("-") or name[:1] in "‐‑‒–—―−─━﹘﹣－ー":
        plain = "--" + re.sub(r"^\W+", "", name).replace("-", "_")
        hint = did_you_mean(plain, [f"--{each}" for each in known]) or "; --help_all lists every flag."
        hint += "" if argument.startswith("--") else " Flags begin with two plain dashes (--)."
    else:
        hint = "; a flag's value is one word: put a text with blanks between quotes"
    return f"unknown argument {name!r}{hint}"
