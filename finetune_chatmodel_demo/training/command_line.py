"""finetune.py's command line: the original demo's flags, all of `TrainingArguments`, or one JSON/YAML file.

    python finetune_chatmodel_demo/finetune.py --help

Only what was given is returned, so that `settings` can choose the defaults by method and by device. `pasted` repairs
command lines that arrived damaged, `foreign_flags` translates the flags of other programs.
"""

import argparse
import difflib
import json
import re
from dataclasses import MISSING, fields
from pathlib import Path

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.training.arguments import (
    GenerationArguments,
    MethodArguments,
    ModelArguments,
    RunArguments,
    StageArguments,
)
from finetune_chatmodel_demo.training.foreign_flags import RENAMED, REPLACED, WITHOUT_EFFECT, translate_flag
from finetune_chatmodel_demo.training.pasted import repair_arguments, repair_values

FOREIGN_FLAGS = {*RENAMED, *WITHOUT_EFFECT, *REPLACED}
# transformers 5.23 renamed the first to the second.
CHECKPOINTING_FLAGS = ("gradient_checkpointing", "activation_checkpointing")
CONFIG_FILE_ENDINGS = (".json", ".yaml", ".yml")
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


def quick_help() -> str:
    """Returns the help text of the own flags, without importing transformers."""
    parser = argparse.ArgumentParser(
        prog="finetune.py",
        usage="finetune.py [SETTINGS.json|SETTINGS.yaml] [--flag value ...]",
        description="Fine-tunes a ChatGLM3: --stage says from what it learns, --finetuning_type what is trained. "
        "Examples of settings files are in finetune_chatmodel_demo/configs.",
        epilog=COMMON_TRAINER_FLAGS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, arguments in OWN_ARGUMENTS.items():
        group = parser.add_argument_group(title)
        for item in fields(arguments):
            text = item.metadata.get("help", "")
            if item.default is not MISSING and item.default is not None:
                text += f" Default: {item.default}."
            group.add_argument(f"--{item.name}", metavar="X", help=text.replace("%", "%%"))
    return parser.format_help()


def parse_given(argv: list[str]) -> tuple[dict[str, object], list[str]]:
    """Parses the command line.

    Args:
        argv: flags; a JSON or YAML file may stand first (alone, as in the original demo, or with flags that
            override it).

    Returns:
        The options that were given, converted to their types, and notices about what was repaired, or has no effect.

    Raises:
        UserError: for an unknown flag, a value that cannot be converted, or a command line that arrived damaged.
    """
    parser = build_parser()
    known = {name.replace("-", "_") for action in parser._actions for name in _names(action)}
    argv, notices = repair_arguments(argv, known | FOREIGN_FLAGS)
    if argv and not argv[0].startswith("-") and argv[0].endswith(CONFIG_FILE_ENDINGS):
        argv = _flags_of_file(_find_config(argv[0])) + argv[1:]
    argv = _translate_flags(argv, notices)
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(_describe_unknown(unknown[0], parser))
    return vars(values), notices


def build_parser() -> argparse.ArgumentParser:
    """Returns a parser of all flags that leaves out of its result what was not given."""
    from transformers import HfArgumentParser, TrainingArguments

    class Parser(HfArgumentParser):
        def error(self, message: str) -> None:
            raise UserError(message + _suggest_choice(message, self))

    parser = Parser((*OWN_ARGUMENTS.values(), TrainingArguments), prog="finetune.py", allow_abbrev=False)
    for action in parser._actions:
        action.default = argparse.SUPPRESS
        action.required = False
        if action.dest in CHECKPOINTING_FLAGS:
            action.type, action.metavar = read_checkpointing, "none|mlp|full"
    return parser


def read_checkpointing(value: str) -> bool | str:
    """--gradient_checkpointing: transformers' True and False, or a policy; "mlp" stays a word."""
    from transformers.hf_argparser import string_to_bool

    named = {"none": False, "full": True, "mlp": "mlp"}
    try:
        return named[value] if value in named else string_to_bool(value)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{value!r} is none of none, mlp, full (or False, True)") from error


def _names(action: argparse.Action) -> list[str]:
    return [option[2:] for option in action.option_strings if option.startswith("--")]


def _translate_flags(argv: list[str], notices: list[str]) -> list[str]:
    """Rewrites flags that other programs know, and repairs values; see `foreign_flags` and `pasted`."""
    result: list[str] = []
    for flag, values in _split_flags(argv):
        name = flag.lstrip("-").replace("-", "_")
        values = repair_values(name, values, notices)
        arguments, notice = translate_flag(name, values) if flag.startswith("--") else (None, None)
        result += [flag, *values] if arguments is None else arguments
        notices += [notice] if notice else []
    return result


def _split_flags(argv: list[str]) -> list[tuple[str, list[str]]]:
    """Groups arguments by flag: `--a 1 --b=2` becomes [("--a", ["1"]), ("--b", ["2"])]."""
    groups: list[tuple[str, list[str]]] = []
    for item in argv:
        if item.startswith("--"):
            flag, equals, value = item.partition("=")
            groups.append((flag, [value] if equals else []))
        elif groups:
            groups[-1][1].append(item)
        else:
            groups.append((item, []))
    return groups


def _find_config(path: str) -> Path:
    """The settings file; one whose path was written with backslashes is found on every system."""
    slashes = Path(path.replace("\\", "/"))
    return slashes if not Path(path).is_file() and slashes.is_file() else Path(path)


def _flags_of_file(path: Path) -> list[str]:
    """Reads a settings file as flags, so that both ways in have the same names, types and errors.

    (YAML reads `2e-2` as text, for instance; as a flag's value it is a number.)
    """
    if not path.is_file():
        raise UserError(f"the settings file {path} does not exist")
    import yaml

    try:
        text = path.read_text(encoding="utf-8-sig")
        settings = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read as {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds a {type(settings).__name__}; write one mapping of flag names to values")
    flags: list[str] = []
    for name, value in settings.items():
        if value is None:
            continue
        if isinstance(value, list):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags.append(f"--{name}={json.dumps(value) if isinstance(value, dict) else value}")
    return flags


def _describe_unknown(argument: str, parser: argparse.ArgumentParser) -> str:
    known = [option for action in parser._actions for option in action.option_strings if "_" in option]
    close = difflib.get_close_matches(argument.partition("=")[0].replace("-", "_").replace("__", "--", 1), known)
    hint = f"; did you mean {close[0]}?" if close else "; --help_all lists every flag"
    return f"unknown argument {argument!r}{hint}"


def _suggest_choice(message: str, parser: argparse.ArgumentParser) -> str:
    """`; did you mean cosine?` behind argparse's message about a value that is none of the choices."""
    match = re.match(r"argument (?:--[\w-]+/)*(--[\w-]+): invalid choice: '?([^' ]+)", message)
    if not match:
        return ""
    choices = [str(c) for action in parser._actions if match[1] in action.option_strings for c in action.choices or ()]
    close = difflib.get_close_matches(match[2].lower(), choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
