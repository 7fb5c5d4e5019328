"""The data flags, one definition for `finetune.py`, `inspect_data.py` and everything else that builds a dataset."""

import argparse
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.flags import check_range
from finetune_chatmodel_demo.conversation.file_formats import Formatting

AT_LEAST_ONE = (
    "max_samples",
    "buffer_size",
    "max_seq_length",
    "max_source_length",
    "max_target_length",
    "preprocessing_num_workers",
)


@dataclass
class DataArguments:
    """Where the rows come from and how they are cut. Names and defaults of lengths are the original demo's."""

    train_format: Literal["multi-turn", "input-output"] = field(
        default="multi-turn",
        metadata={"help": "multi-turn: records with 'conversations'; input-output: with 'prompt' and 'response'."},
    )
    formatting: Formatting | None = field(
        default=None,
        metadata={"help": "Format that the files have to be in; default: each record's keys tell."},
    )
    train_file: str | None = field(default=None, metadata={"help": "Training records: JSON array or JSON lines."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation records, same format."})
    dataset: str | None = field(
        default=None, metadata={"help": "Data sets of the registry, a,b,c: in place of --train_file."}
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Data sets of the registry to validate on: in place of --validation_file."}
    )
    dataset_dir: str | None = field(
        default=None,
        metadata={"help": "Folder with dataset_info.json; default: data, else the registry that comes along."},
    )
    template: Literal["chatglm3", "default", "raw"] = field(
        default="chatglm3",
        metadata={"help": "How conversations become text: chatglm3 (role tokens), default (base models), raw."},
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Most records of each data set: its first good ones; no more are read."}
    )
    val_size: float = field(
        default=0.0,
        metadata={
            "help": "Held out of the training data for validation: a share below 1, or a number of rows (pt: "
            "documents), drawn by --seed; with --streaming the first so many."
        },
    )
    mix_strategy: Literal["concat", "interleave_under", "interleave_over"] = field(
        default="concat",
        metadata={"help": "Several data sets: one after the other, or drawn in turn until the first / the last ends."},
    )
    interleave_probs: str | None = field(
        default=None, metadata={"help": "interleave_*: the data sets' probabilities, e.g. 0.7,0.3; default: equal."}
    )
    streaming: bool = field(
        default=False, metadata={"help": "Read rows while training, for data that memory cannot hold; --max_steps."}
    )
    buffer_size: int = field(default=16384, metadata={"help": "--streaming: rows among which the order is random."})
    strict_sha1: bool = field(
        default=False, metadata={"help": "A file_sha1 of the registry that does not match is an error."}
    )
    allow_dataset_scripts: bool = field(
        default=False, metadata={"help": "Run the Python program that a data set's script_url names."}
    )
    max_seq_length: int = field(
        default=2048,
        metadata={
            "help": "Most tokens of a row (but see the next two); also --cutoff_len.",
            "aliases": ("--cutoff_len",),
        },
    )
    packing: bool = field(
        default=False,
        metadata={"help": "Several conversations share a row of --max_seq_length tokens without seeing each other."},
    )
    max_source_length: int = field(default=1024, metadata={"help": "input-output: most tokens of the prompt."})
    max_target_length: int = field(default=128, metadata={"help": "input-output: most tokens of the response."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenize large files; default: this process alone."}
    )
    tokenized_cache: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the rows of data files; none: keep none; default: ~/.cache, for files over 32 MiB."
        },
    )
    truncation_strategy: Literal["turns", "official"] = field(
        default="turns",
        metadata={"help": "Rows that are too long: turns cuts where a reply ends, official at the limit."},
    )
    on_bad_record: Literal["error", "skip"] = field(
        default="error", metadata={"help": "Bad records: stop at the first, or skip and count them."}
    )

    def __post_init__(self):
        check_range(self, "[1, inf)", *AT_LEAST_ONE)
        check_range(self, "[0, inf)", "val_size")
        if self.train_format == "input-output" and self.template != "chatglm3":
            raise UserError(
                f"--train_format input-output has its own form; drop --template {self.template}, or write the records "
                "as conversations (--train_format multi-turn)"
            )

    @property
    def prompt_format(self) -> Literal["multi-turn", "input-output", "default", "raw"]:
        """What a checkpoint that was trained on these rows records, for `render_prompt`."""
        return self.train_format if self.template == "chatglm3" else self.template

    def dataset_options(self) -> dict[str, Any]:
        """The keywords of `build_dataset` besides format, path and tokenizer."""
        names = ("max_seq_length", "max_source_length", "max_target_length", "truncation_strategy", "on_bad_record")
        return {name: getattr(self, name) for name in names} | {"num_workers": self.preprocessing_num_workers}


def read_data_arguments(namespace: argparse.Namespace) -> DataArguments:
    """Picks the fields of `DataArguments` out of parsed flags."""
    return DataArguments(**{entry.name: getattr(namespace, entry.name) for entry in dataclasses.fields(DataArguments)})
