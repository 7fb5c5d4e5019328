"""The data of a run: from files or from the registry to the rows that a stage trains and validates on.

    data = build_stage_data(DataArguments(train_file="x.jsonl", val_size=0.1), "sft", tokenizer, seed=42)
    data.train[0], data.validation, print(data.table)

What happens, in this order: each data set is read (at most its first --max_samples good records) and rendered; rows are
held out for validation (--val_size); the rest is mixed (--mix_strategy); documents of pt are packed into blocks. Every
draw is a function of the seed alone. See the outcome with `inspect_data.py`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from wcwidth import wcswidth

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.common.tables import format_table
from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.conversation.mixing import draw_held_out, mix_order, parse_probabilities
from finetune_chatmodel_demo.conversation.packing import PackedDataset, block_capacity
from finetune_chatmodel_demo.conversation.records import STAGE_KINDS, RecordSource, read_records
from finetune_chatmodel_demo.conversation.render import ChatTokenizer, RowSettings, Stage
from finetune_chatmodel_demo.conversation.rows import DatasetReport, Rows, join
from finetune_chatmodel_demo.conversation.tokenizing import build_rows

BAD_RECORDS_SHOWN = 3
WIDEST = 100
EXACT_TOKENS = 100_000_000  # more are shown in millions


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
        UserError: Flags contradict each other, or are missing; a data set is unknown, a record is bad, or no row is
            left.
    """
    check_flags(data, stage, needs_train)
    settings = make_row_settings(data, stage)
    if data.streaming and needs_train:
        return _stream(data, settings, tokenizer, seed, show_progress)
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
    train, validation = join(train_sets), join(validation_sets)
    if train_sets:
        held_out = draw_held_out(data.val_size, len(train), seed)
        if data.val_size:
            validation = train.select(np.flatnonzero(held_out))
        order = _mix(train_sets, ~held_out, data, probabilities, seed) if needs_train else None
        train = _take(train, order) if needs_train else None
    drawn = [*(train.count_by_source() if train is not None else [0] * len(train_sets)), *[0] * len(validation_sets)]
    if stage == "pt":
        train, validation = (_pack(rows, tokenizer, data.max_seq_length) for rows in (train, validation))
    named = zip(train_sources + validation_sources, train_sets + validation_sets, drawn, strict=True)
    return StageData(train, validation, describe(list(named), data, stage, train, validation))


def _mix(
    sets: Sequence[Rows], is_kept: np.ndarray, data: DataArguments, probabilities: Sequence[float] | None, seed: int
) -> np.ndarray:
    """(rows,) the rows of all data sets, joined, that are trained on, in their order."""
    ends = np.cumsum([len(rows) for rows in sets])
    parts = np.split(np.arange(ends[-1]), ends[:-1])
    parts = [part[is_kept[part]] for part in parts]
    for rows, part in zip(sets, parts, strict=True):
        if data.mix_strategy != "concat" and not len(part):
            raise UserError(
                f"--val_size holds out every row of {rows.report.path}, and --mix_strategy {data.mix_strategy} needs "
                "at least one of each data set; make --val_size smaller, or use concat"
            )
    return mix_order(parts, data.mix_strategy, probabilities, seed)


def _stream(
    data: DataArguments, settings: RowSettings, tokenizer: ChatTokenizer, seed: int, show_progress: bool | None
) -> StageData:
    """With --streaming: `train` is a `StreamedRows`, `validation` is in memory.

    `--val_size` is a number of rows (pt: documents) at the start of the data, the same from each data set (the first
    ones give one more where that does not come out even).

    Raises:
        UserError: --val_size is a share, whose number of rows nobody knows before everything was read.
    """
    from finetune_chatmodel_demo.conversation.streaming import StreamedRows  # needs torch

    train, validation = open_sources(data, settings.stage)
    probabilities = parse_probabilities(data.interleave_probs, len(train), data.mix_strategy)
    if 0 < data.val_size < 1:
        raise UserError(
            f"--val_size {data.val_size:g} is a share, and --streaming does not know how many rows there are; give a "
            "number of rows"
        )
    total = int(data.val_size)
    wanted = [total // len(train) + (number < total % len(train)) for number in range(len(train))]
    skipped = [_count_records(each, rows, tokenizer, settings) for each, rows in zip(train, wanted, strict=True)]
    for source, count in zip(train, skipped, strict=True):
        if count:
            validation.append(NamedSource(f"{source.name} (held out)", source.records.first(count)))
    options = {"num_workers": data.preprocessing_num_workers, "show_progress": show_progress}
    sets = [build_rows(source.records, tokenizer, settings, **options) for source in validation]
    rows = join(sets)
    if settings.stage == "pt":
        rows = _pack(rows, tokenizer, data.max_seq_length)
    streamed = StreamedRows(
        [source.records for source in train],
        tokenizer,
        settings,
        strategy=data.mix_strategy,
        probabilities=probabilities,
        seed=seed,
        buffer_size=data.buffer_size,
        skipped=skipped,
    )
    named = zip(validation, sets, [0] * len(sets), strict=True)
    lines = [describe(list(named), data, settings.stage, None, rows)] if sets else []
    unit = "blocks" if settings.stage == "pt" else "rows"
    how = f", {data.mix_strategy}" if len(train) > 1 else ""
    names = ", ".join(source.name for source in train)
    lines.append(f"train:      {names}: read while training{how}, shuffled among {data.buffer_size:,} {unit}")
    return StageData(streamed, rows, "\n".join(lines))


def _count_records(source: NamedSource, rows: int, tokenizer: ChatTokenizer, settings: RowSettings) -> int:
    """How many good records at the start of a source make so many rows.

    Raises:
        UserError: They are all there is, or not enough.
    """
    if not rows:
        return 0
    found = 0
    for count, located in enumerate(source.records.iterate_located(), 1):
        if found == rows:
            return count - 1
        found += settings.render(tokenizer, located.value).problem is None
    raise UserError(
        f"--val_size would hold out {rows} rows of {source.name}, which leaves nothing to train on; make it smaller"
    )


def check_flags(data: DataArguments, stage: str, needs_train: bool = True) -> None:
    """Refuses flags that contradict each other, before anything is read.

    Raises:
        UserError: Says which, and what to do.
    """
    if stage not in STAGE_KINDS:
        raise UserError(f"stage {stage!r} is unknown; use {', '.join(STAGE_KINDS)}")
    for file, names in (("train_file", "dataset"), ("validation_file", "eval_dataset")):
        if getattr(data, file) and getattr(data, names):
            raise UserError(f"--{file} and --{names} exclude each other; give one (a registry can name any file)")
    has_train = bool(data.train_file or data.dataset)
    has_validation = bool(data.validation_file or data.eval_dataset)
    if not has_train and (needs_train or not has_validation or data.val_size):
        raise UserError("there is nothing to read: give --train_file FILE, or --dataset with names of the registry")
    if data.val_size and has_validation:
        raise UserError(
            "--val_size holds rows of the training data out, and validation data is given as well; drop one of them"
        )
    if data.train_format == "input-output" and (stage != "sft" or data.dataset or data.eval_dataset):
        raise UserError(
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
        sources = [NamedSource(Path(file).name, read_records(file, kind, data.on_bad_record, data.formatting))]
    elif names:
        sources = _open_registry(data, kind, names)
    else:
        return []
    if data.max_samples is None:
        return sources
    return [NamedSource(each.name, each.records.first(data.max_samples)) for each in sources]


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
                strict_sha1=data.strict_sha1,
            ),
        )
        for entry in choose_entries(read_registry(folder), names)
    ]


def _take(rows: Rows, order: np.ndarray) -> Rows:
    """The rows in an order; themselves where that is all of them, one after the other."""
    is_all = len(order) == len(rows) and bool((order == np.arange(len(rows))).all())
    return rows if is_all else rows.select(order)


def _pack(documents: Rows | None, tokenizer: ChatTokenizer, max_seq_length: int) -> PackedDataset | None:
    """Documents as blocks; None stays None."""
    return None if documents is None else PackedDataset(documents, tokenizer, max_seq_length)


def describe(
    sets: Sequence[tuple[NamedSource, Rows, int]], data: DataArguments, stage: Stage, train: Any, validation: Any
) -> str:
    """The table, the first bad records, and what is trained and validated on.

    Args:
        sets: Each data set, with how many of its rows are in an epoch.
        data: The data flags.
        stage: What the rows are for.
        train: Rows or blocks, or None.
        validation: The same.
    """
    lines = [format_data_table([(source.name, rows.report, count) for source, rows, count in sets])]
    for source, _, _ in sets:
        lines += [f"bad: {message}" for message in source.records.bad_messages[:BAD_RECORDS_SHOWN]]
    unit = "blocks" if stage == "pt" else "rows"
    if train is not None:
        mixed = f", {data.mix_strategy}" if data.dataset and "," in data.dataset else ""
        lines.append(f"train:      {len(train):,} {unit}, {train.report.tokens_total:,} tokens{mixed}")
    if validation is not None:
        held_out = f", --val_size {data.val_size:g}" if data.val_size else ""
        lines.append(f"validation: {len(validation):,} {unit}, {validation.report.tokens_total:,} tokens{held_out}")
    return "\n".join(lines)


def format_data_table(sets: Sequence[tuple[str, DatasetReport, int]]) -> str:
    """One line for each data set, at most WIDEST columns wide, also where names are Chinese.

    `read` counts records; those that are `bad`, have `no target` or are `too long` are dropped, the rest is `kept`.
    `cut` rows lack something because of the length limit; `supervised` is the share of the tokens that are targets;
    `train` is how many rows (pt: documents) of an epoch come from the data set.

    Args:
        sets: Name, report, and rows of an epoch of each data set.
    """
    rows = [_cells(*each) for each in sets]
    widths = [max(len(heading), *(len(row[heading]) for row in rows)) for heading in list(rows[0])[1:]]
    room = WIDEST - sum(widths) - 2 * len(widths)
    return format_table([row | {"data set": _shorten(row["data set"], room)} for row in rows], right=list(rows[0])[1:])


def _cells(name: str, report: DatasetReport, train_rows: int) -> dict[str, str]:
    tokens = report.tokens_total
    share = report.tokens_supervised / max(1, tokens)
    return {
        "data set": name,
        "read": f"{report.rows_read + report.rows_bad:,}",
        "bad": f"{report.rows_bad:,}",
        "no target": f"{report.rows_dropped_masked:,}",
        "too long": f"{report.rows_dropped_long:,}",
        "kept": f"{report.rows_kept:,}",
        "cut": f"{report.rows_cut:,}",
        "tokens": f"{tokens:,}" if tokens < EXACT_TOKENS else f"{tokens / 1e6:,.0f}M",
        "supervised": f"{share:.1%}" if report.tokens_supervised else "-",
        "train": f"{train_rows:,}" if train_rows else "-",
    }


def _shorten(text: str, width: int) -> str:
    """Leaves out the beginning of a text that is too wide: the end of a path tells most."""
    if wcswidth(text) <= width:
        return text
    while wcswidth(text) > width - 1:
        text = text[1:]
    return f"…{text}"
