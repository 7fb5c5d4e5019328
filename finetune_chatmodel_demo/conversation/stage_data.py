"""The data of a run: from files or from the registry to the rows that a stage trains and validates on.

    data = build_stage_data(DataArguments(train_file="x.jsonl", val_size=0.1), "sft", tokenizer, seed=42)
    data.train[0], data.validation, print(data.table)

What happens, in this order: each data set is read (at most its first --max_samples good records) and rendered; rows are
held out for validation (--val_size); the rest is mixed (--mix_strategy); documents of pt are packed into blocks. Every
draw is a function of the seed alone. See the outcome with `inspect_data.py`.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.conversation.json_files import Located
from finetune_chatmodel_demo.conversation.mixing import MixStrategy, RowView, mix_order, parse_probabilities, split_rows
from finetune_chatmodel_demo.conversation.packing import PackedDataset, block_capacity
from finetune_chatmodel_demo.conversation.records import STAGE_KINDS, RecordSource, read_records
from finetune_chatmodel_demo.conversation.render import ChatTokenizer, RowSettings, Stage
from finetune_chatmodel_demo.conversation.rows import build_rows
from finetune_chatmodel_demo.conversation.tables import format_data_table

BAD_RECORDS_SHOWN = 3


@dataclass(frozen=True)
class StageData:
    """What a run trains and validates on.

    Attributes:
        train: Map-style rows (with --streaming an iterable data set); None where none were asked for.
        validation: Map-style rows, or None.
        table: What became of the records, for people.
    """

    train: Any
    validation: Any
    table: str


@dataclass(frozen=True)
class NamedSource:
    """A source of records, by the name that the table shows."""

    name: str
    records: RecordSource


class FirstRecords:
    """The first good records of a source; what comes after them is not read."""

    def __init__(self, records: RecordSource, count: int):
        self._records, self._count = records, count
        self.path = records.path

    @property
    def bad_count(self) -> int:
        """Bad records that were skipped on the way."""
        return self._records.bad_count

    @bad_count.setter
    def bad_count(self, count: int) -> None:
        self._records.bad_count = count

    @property
    def bad_messages(self) -> list[str]:
        """What was wrong with the first of them."""
        return self._records.bad_messages

    @bad_messages.setter
    def bad_messages(self, messages: list[str]) -> None:
        self._records.bad_messages = messages

    def fingerprint(self) -> str | None:
        """What the records follow from, beside the file's content."""
        return f"{self._count} of {self._records.fingerprint()}" if hasattr(self._records, "fingerprint") else None

    def iterate_located(self) -> Iterator[Located]:
        """The records, each with its number and line."""
        return itertools.islice(self._records.iterate_located(), self._count)

    def where(self, number: int, line: int) -> str:
        """Names the place of a record."""
        return self._records.where(number, line)


def build_stage_data(
    data: DataArguments,
    stage: Stage,
    tokenizer: ChatTokenizer,
    seed: int,
    *,
    needs_train: bool = True,
    show_progress: bool | None = None,
) -> StageData:
    """Reads, renders, splits and mixes what the flags name.

    Args:
        data: The data flags.
        stage: What the rows are for; STAGE_KINDS says which records it needs.
        tokenizer: See `ChatTokenizer`; must be picklable where several processes work.
        seed: Of everything that is drawn.
        needs_train: False where nothing is trained: only validation rows are built, and without any named for that
            (--validation_file, --eval_dataset, --val_size) the rows of --train_file or --dataset are those.
        show_progress: Whether to draw progress bars on stderr; None: where that is a terminal.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: Flags contradict each other, or are missing.
        RecordError: A data set is unknown, a record is bad, or no row is left.
    """
    check_flags(data, stage, needs_train)
    settings = make_row_settings(data, stage)
    if data.streaming and needs_train:
        from finetune_chatmodel_demo.conversation.streaming import build_streamed_data  # needs torch

        return build_streamed_data(data, settings, tokenizer, seed, show_progress=show_progress)
    train_sources, validation_sources = open_sources(data, stage)
    probabilities = parse_probabilities(data.interleave_probs, len(train_sources), data.mix_strategy)
    if not needs_train and not data.val_size:
        train_sources, validation_sources = [], validation_sources or train_sources
    options = {
        "num_workers": data.preprocessing_num_workers,
        "show_progress": show_progress,
        "tokenized_cache": data.tokenized_cache,
    }
    train_sets, validation_sets = (
        [build_rows(source.records, tokenizer, settings, **options) for source in sources]
        for sources in (train_sources, validation_sources)
    )
    rows_left, validation = [np.arange(len(rows)) for rows in train_sets], concatenate(validation_sets)
    if data.val_size:
        rows_left, order = split_rows([len(rows) for rows in train_sets], data.val_size, seed)
        validation = RowView(train_sets, order)
    train = mix(train_sets, rows_left, data.mix_strategy, probabilities, seed) if needs_train else None
    if stage == "pt":
        train, validation = (pack(rows, tokenizer, data.max_seq_length) for rows in (train, validation))
    named = list(zip(train_sources + validation_sources, train_sets + validation_sets))
    return StageData(train, validation, describe(named, data, stage, train, validation))


def check_flags(data: DataArguments, stage: str, needs_train: bool = True) -> None:
    """Refuses flags that contradict each other, before anything is read.

    Raises:
        ValueError: Says which, and what to do.
    """
    if stage not in STAGE_KINDS:
        raise ValueError(f"stage {stage!r} is unknown; use {', '.join(STAGE_KINDS)}")
    for file, names in (("train_file", "dataset"), ("validation_file", "eval_dataset")):
        if getattr(data, file) and getattr(data, names):
            raise ValueError(f"--{file} and --{names} exclude each other; give one (a registry can name any file)")
    has_train = bool(data.train_file or data.dataset)
    has_validation = bool(data.validation_file or data.eval_dataset)
    if not has_train and (needs_train or not has_validation or data.val_size):
        raise ValueError("there is nothing to read: give --train_file FILE, or --dataset with names of the registry")
    if data.val_size and has_validation:
        raise ValueError(
            "--val_size holds rows of the training data out, and validation data is given as well; drop one of them"
        )
    if data.train_format == "input-output" and (stage != "sft" or data.dataset or data.eval_dataset):
        raise ValueError(
            "--train_format input-output is for --train_file with --stage sft; drop it (data sets of the registry "
            "become conversations, whatever their format)"
        )
    if stage == "pt":
        block_capacity(data.max_seq_length)


def make_row_settings(data: DataArguments, stage: Stage) -> RowSettings:
    """How the flags have a record become a row."""
    return RowSettings(
        data.train_format,
        data.max_seq_length,
        data.max_source_length,
        data.max_target_length,
        data.truncation_strategy,
        stage,
        data.template,
    )


def open_sources(data: DataArguments, stage: Stage) -> tuple[list[NamedSource], list[NamedSource]]:
    """The sources of records to train and to validate on; nothing is read yet.

    Raises:
        FileNotFoundError: There is no such file.
        RecordError: A data set is unknown, or cannot serve the stage.
    """
    train = _open(data, stage, data.train_file, data.dataset)
    validation = _open(data, stage, data.validation_file, data.eval_dataset)
    return train, [NamedSource(f"{source.name} (eval)", source.records) for source in validation]


def _open(data: DataArguments, stage: Stage, file: str | None, names: str | None) -> list[NamedSource]:
    kind = data.train_format if stage == "sft" else STAGE_KINDS[stage]
    if file:
        sources = [NamedSource(Path(file).name, read_records(file, kind, data.on_bad_record))]
    elif names:
        sources = _open_registry(data, kind, names)
    else:
        return []
    if data.max_samples is None:
        return sources
    return [NamedSource(each.name, FirstRecords(each.records, data.max_samples)) for each in sources]


def _open_registry(data: DataArguments, kind: str, names: str) -> list[NamedSource]:
    from finetune_chatmodel_demo.conversation.registry import choose_entries, find_dataset_dir, read_registry
    from finetune_chatmodel_demo.conversation.sources import open_dataset

    folder = find_dataset_dir(data.dataset_dir)
    return [
        NamedSource(
            entry.name,
            open_dataset(
                entry,
                folder,
                kind,
                on_bad_record=data.on_bad_record,
                allow_dataset_scripts=data.allow_dataset_scripts,
                streaming=data.streaming,
            ),
        )
        for entry in choose_entries(read_registry(folder), names)
    ]


def mix(
    datasets: Sequence[Any],
    rows: Sequence[np.ndarray],
    strategy: MixStrategy,
    probabilities: Sequence[float] | None,
    seed: int,
) -> Any:
    """Some rows of each data set, mixed.

    Args:
        datasets: The data sets.
        rows: Rows of each that take part, in their order.
        strategy: See `mix_order`, also for the probabilities and the seed.

    Raises:
        ValueError: A data set that is to be interleaved has no row left.
    """
    if len(datasets) == 1 and len(rows[0]) == len(datasets[0]):
        return datasets[0]
    for dataset, chosen in zip(datasets, rows):
        if strategy != "concat" and not len(chosen):
            raise ValueError(
                f"--val_size holds out every row of {dataset.report.path}, and --mix_strategy {strategy} needs at "
                "least one of each data set; make --val_size smaller, or use concat"
            )
    order = mix_order([len(chosen) for chosen in rows], strategy, probabilities, seed)
    for number, chosen in enumerate(rows):
        is_mine = order[:, 0] == number
        order[is_mine, 1] = chosen[order[is_mine, 1]]
    return RowView(datasets, order)


def pack(documents: Any, tokenizer: ChatTokenizer, max_seq_length: int) -> PackedDataset | None:
    """Documents as blocks; None stays None."""
    return None if documents is None else PackedDataset(documents, tokenizer, max_seq_length)


def concatenate(datasets: Sequence[Any]) -> Any:
    """All rows of all data sets, one after the other; None where there is none."""
    if len(datasets) < 2:
        return datasets[0] if datasets else None
    return RowView(datasets, mix_order([len(rows) for rows in datasets], "concat"))


def count_drawn(rows: Any, datasets: Sequence[Any]) -> list[int]:
    """How many of the rows come from each of the data sets."""
    if not isinstance(rows, RowView):
        return [len(rows) if dataset is rows else 0 for dataset in datasets]
    counts = np.bincount(rows.order[:, 0], minlength=len(rows.datasets)).tolist()
    return [next((count for each, count in zip(rows.datasets, counts) if each is dataset), 0) for dataset in datasets]


def describe(
    sets: Sequence[tuple[NamedSource, Any]], data: DataArguments, stage: Stage, train: Any, validation: Any
) -> str:
    """The table, the first bad records, and what is trained and validated on."""
    documents = train.documents if isinstance(train, PackedDataset) else train
    drawn = count_drawn(documents, [rows for _, rows in sets])
    table = format_data_table([(source.name, rows.report, count) for (source, rows), count in zip(sets, drawn)])
    lines = [table]
    for source, _ in sets:
        lines += [f"bad: {message}" for message in source.records.bad_messages[:BAD_RECORDS_SHOWN]]
    unit = "blocks" if stage == "pt" else "rows"
    if train is not None:
        mixed = f", {data.mix_strategy}" if data.dataset and "," in data.dataset else ""
        lines.append(f"train:      {len(train):,} {unit}, {train.report.tokens_total:,} tokens{mixed}")
    if validation is not None:
        held_out = f", --val_size {data.val_size:g}" if data.val_size else ""
        lines.append(f"validation: {len(validation):,} {unit}, {validation.report.tokens_total:,} tokens{held_out}")
    return "\n".join(lines)
