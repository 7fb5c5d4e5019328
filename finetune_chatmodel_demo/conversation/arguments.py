"""The data flags, one definition for `finetune.py`, `inspect_data.py` and everything else that builds a dataset."""

import argparse
import dataclasses
import types
import typing
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass
class DataArguments:
    """Where the rows come from and how they are cut. Names and defaults of lengths are the original demo's."""

    train_format: Literal["multi-turn", "input-output"] = field(
        default="multi-turn",
        metadata={"help": "multi-turn: records with 'conversations'; input-output: with 'prompt' and 'response'."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Training records: JSON array or JSON lines."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation records, same format."})
    max_seq_length: int = field(default=2048, metadata={"help": "Most tokens of a multi-turn row."})
    max_source_length: int = field(default=1024, metadata={"help": "input-output: most tokens of the prompt."})
    max_target_length: int = field(default=128, metadata={"help": "input-output: most tokens of the response."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenize large files; default: this process alone."}
    )
    truncation_strategy: Literal["turns", "official"] = field(
        default="turns",
        metadata={"help": "Rows that are too long: turns cuts where a reply ends, official at the limit."},
    )
    on_bad_record: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Bad records: stop at the first, or skip and count them."}
    )

    def __post_init__(self):
        for name in ("max_seq_length", "max_source_length", "max_target_length", "preprocessing_num_workers"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"--{name} must be at least 1, got {value}")

    def dataset_options(self) -> dict[str, Any]:
        """The keywords of `build_dataset` besides format, path and tokenizer."""
        names = ("max_seq_length", "max_source_length", "max_target_length", "truncation_strategy", "on_bad_record")
        return {name: getattr(self, name) for name in names} | {"num_workers": self.preprocessing_num_workers}


def add_data_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the fields of `DataArguments` as flags, for programs whose `--help` must not import transformers."""
    for entry in dataclasses.fields(DataArguments):
        options: dict[str, Any] = {"default": entry.default, "help": f"{entry.metadata['help']} [%(default)s]"}
        if typing.get_origin(entry.type) is Literal:
            options["choices"] = typing.get_args(entry.type)
        elif isinstance(entry.type, types.UnionType):
            options["type"] = typing.get_args(entry.type)[0]
        else:
            options["type"] = entry.type
        parser.add_argument(f"--{entry.name}", **options)


def read_data_arguments(namespace: argparse.Namespace) -> DataArguments:
    """Picks the fields of `DataArguments` out of parsed flags."""
    return DataArguments(**{entry.name: getattr(namespace, entry.name) for entry in dataclasses.fields(DataArguments)})
