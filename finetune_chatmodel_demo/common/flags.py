"""Flags that dataclasses describe: types and help for argparse, and ranges that are checked where the values are held.

A field's metadata may say `help`, `choices`, and `aliases` (further names of the flag).
"""

import argparse
import dataclasses
import types
import typing
from typing import Any, Literal

from finetune_chatmodel_demo.common.errors import UserError


def add_fields(parser: Any, arguments: type) -> None:
    """Adds each field of a dataclass as a flag.

    Args:
        parser: an `ArgumentParser`, or a group of one.
        arguments: fields without a default need none here either: what is missing is told by who reads it.
    """
    for entry in dataclasses.fields(arguments):
        default = None if entry.default is dataclasses.MISSING else entry.default
        help_text = str(entry.metadata.get("help", "")).replace("%", "%%")
        if default not in (None, ""):
            help_text += f" Default: {default}."
        parser.add_argument(
            f"--{entry.name}",
            *entry.metadata.get("aliases", ()),
            default=default,
            help=help_text,
            **_describe_values(entry),
        )


def _describe_values(entry: dataclasses.Field) -> dict[str, Any]:
    """What argparse is told about a flag's values."""
    is_union = typing.get_origin(entry.type) in (typing.Union, types.UnionType)
    kinds = [kind for kind in typing.get_args(entry.type) if kind is not type(None)] if is_union else [entry.type]
    kind = kinds[0]
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    if kind is bool:
        return {"type": parse_bool, "nargs": "?", "const": True, "metavar": "BOOL"}
    if typing.get_origin(kind) is list:
        return {"nargs": "+", "metavar": "X"}
    choices = entry.metadata.get("choices")
    return {"type": kind, **({"choices": choices} if choices else {"metavar": "X"})}


def parse_bool(text: str) -> bool:
    """`True`, `false`, `yes`, `0`, … as transformers' parser takes them.

    Raises:
        argparse.ArgumentTypeError: Neither true nor false.
    """
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def check_range(arguments: Any, interval: str, *names: str) -> None:
    """Checks fields of a dataclass; for its `__post_init__`.

    Args:
        arguments: holds the values; None has no range.
        interval: as mathematics writes it: `[1, inf)` is 1 or more, `(0, 1]` above 0 and at most 1.
        names: of the fields.

    Raises:
        UserError: for the first value outside of the interval.
    """
    for name in names:
        check_number(name, getattr(arguments, name), interval)


def check_number(name: str, value: float | None, interval: str) -> None:
    """Checks one number, of the flag `name`; see `check_range`.

    Raises:
        UserError: it is outside of the interval.
    """
    if value is None:
        return
    low, high = (float(end) for end in interval[1:-1].split(","))
    is_above = value >= low if interval[0] == "[" else value > low
    is_below = value <= high if interval[-1] == "]" else value < high
    if is_above and is_below:
        return
    words = [f"{'at least' if interval[0] == '[' else 'above'} {low:g}"]
    if high < float("inf"):
        words.append(f"{'at most' if interval[-1] == ']' else 'below'} {high:g}")
    raise UserError(f"--{name} is {value:g}; it must be {' and '.join(words)}")
