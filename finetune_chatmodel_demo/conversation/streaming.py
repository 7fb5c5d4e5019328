"""Rows that are read while training goes on, for data that memory cannot hold (`--streaming`).

One pass over `StreamedRows` gives the rows that the data sets in memory (`stage_data`) would have, each once, in
another order: `--buffer_size` rows are held, and the next one is drawn from these by a seed and the epoch. What is held
at a time is that buffer and one record of each data set. Held to this by `pytest tests/test_streaming.py`.

Data sets are mixed record by record, before rendering. The workers of a DataLoader share the mixed records out among
them, without overlap; each then packs (pt) and shuffles its own. Several processes share rows out through accelerate's
`IterableDatasetShard`: every process reads all records and keeps its part (`dispatch_batches` must be off, since rows
of different lengths cannot be sent around as one tensor).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from finetune_chatmodel_demo.conversation.data_arguments import DataArguments
from finetune_chatmodel_demo.conversation.json_files import Located, RecordError
from finetune_chatmodel_demo.conversation.mixing import MixStrategy, draw_sources, parse_probabilities
from finetune_chatmodel_demo.conversation.packing import block_capacity, make_block
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL, ChatTokenizer, Row, RowSettings
from finetune_chatmodel_demo.conversation.rows import DATASETS, build_rows
from finetune_chatmodel_demo.conversation.stage_data import (
    FirstRecords,
    NamedSource,
    StageData,
    concatenate,
    describe,
    open_sources,
    pack,
)
from finetune_chatmodel_demo.conversation.tokenizing import DatasetReport


class StreamedRows(IterableDataset):
    """Rows of any stage, read and rendered while they are iterated; items are those of the data sets in memory.

    Attributes:
        reports: What has become of the records so far, for each data set; counted anew in each pass, and only in the
            process that reads (a DataLoader's workers keep their own).
        epoch: Chooses the order; the trainer sets it with `set_epoch`.
    """

    def __init__(
        self,
        sources: Sequence[NamedSource],
        tokenizer: ChatTokenizer,
        settings: RowSettings,
        *,
        strategy: MixStrategy = "concat",
        probabilities: Sequence[float] | None = None,
        seed: int = 0,
        buffer_size: int = 1,
        skipped: Sequence[int] | None = None,
    ):
        """
        Args:
            sources: The data sets.
            tokenizer: See `ChatTokenizer`.
            settings: How a record becomes a row.
            strategy: How several data sets are mixed; see `mixing`.
            probabilities: Of the data sets, for an interleave.
            seed: Of mixing and order.
            buffer_size: Rows among which the next one is drawn; 1 keeps the order of the files.
            skipped: How many good records at the start of each data set take no part.
        """
        self.sources, self.tokenizer, self.settings = list(sources), tokenizer, settings
        self.strategy, self.probabilities = strategy, probabilities
        self.seed, self.buffer_size, self.epoch = seed, buffer_size, 0
        self.skipped = list(skipped or [0] * len(self.sources))
        self.reports = [DatasetReport(source.name) for source in self.sources]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    @property
    def report(self) -> DatasetReport:
        """The sum of `reports`."""
        total = DatasetReport(", ".join(source.name for source in self.sources))
        for report in self.reports:
            total.add(report)
        return total

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        shard, shards = (worker.id, worker.num_workers) if worker else (0, 1)
        generator = np.random.default_rng([self.seed, self.epoch, shard])
        yield from map(self._finish, shuffle_in_buffer(self._rows(shard, shards), self.buffer_size, generator))

    def peek(self, count: int) -> list[dict[str, list[int]]]:
        """The first rows in the order of the files, without reading further than they are."""
        return list(map(self._finish, itertools.islice(self._rows(0, 1), count)))

    def _finish(self, row: Any) -> dict[str, list[int]]:
        """A row as a trainer takes it, from what `_rows` gives."""
        if self.settings.stage == "pt":
            return make_block(self.tokenizer.get_prefix_tokens(), row.tolist())
        return DATASETS[self.settings.stage].make_item(*row)

    def _rows(self, shard: int, shards: int) -> Iterator[Any]:
        """What is shuffled, in five bytes a token: the arrays of `compact`; in pt the tokens of a block."""
        self.reports = [DatasetReport(source.name) for source in self.sources]
        rows = self._render(shard, shards)
        if self.settings.stage != "pt":
            return rows
        return pack_stream((parts[0] for parts, _ in rows), block_capacity(self.settings.max_seq_length))

    def _render(self, shard: int, shards: int) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        """Every shards-th record, compact."""
        openers = [self._opener(number) for number in range(len(self.sources))]
        mixed = mix_streams(openers, self.strategy, self.probabilities, self.seed)
        for number, located in itertools.islice(mixed, shard, None, shards):
            report = self.reports[number]
            row = self.settings.render(self.tokenizer, located.value)
            report.rows_bad = self.sources[number].records.bad_count
            if report.count(row):
                parts, is_target = compact(row)
                report.tokens_total += len(is_target)
                report.tokens_supervised += int(is_target.sum())
                yield parts, is_target
        for source, report in zip(self.sources, self.reports):
            report.rows_bad = source.records.bad_count

    def _opener(self, number: int) -> Callable[[], Iterator[Located]]:
        records, skipped = self.sources[number].records, self.skipped[number]
        return lambda: itertools.islice(records.iterate_located(), skipped, None)


def compact(row: Row) -> tuple[list[np.ndarray], np.ndarray]:
    """A row in five bytes a token: int32 ids of each sequence, and (T,) bool over all, 1 where the loss counts."""
    parts = [np.asarray(part, dtype=np.int32) for part in row.parts]
    return parts, np.fromiter((label != IGNORED_LABEL for label in row.labels), dtype=np.bool_, count=len(row.labels))


def mix_streams(
    openers: Sequence[Callable[[], Iterator[Any]]],
    strategy: MixStrategy,
    probabilities: Sequence[float] | None,
    seed: int,
) -> Iterator[tuple[int, Any]]:
    """Mixes streams as `mix_order` mixes data sets of known length: the same order.

    Args:
        openers: Begin a stream, as often as they are called.
        strategy: "concat", "interleave_under" or "interleave_over".
        probabilities: Of the streams; None: they take turns.
        seed: Of the draw.

    Yields:
        Number of the stream, and what it gave.

    Raises:
        RecordError: A stream that is to be interleaved gives nothing.
    """
    if strategy == "concat":
        for number, opener in enumerate(openers):
            yield from ((number, item) for item in opener())
        return
    streams = [opener() for opener in openers]
    # One item ahead: a stream counts as exhausted with its last item, not with the attempt to read on.
    ahead = [next(stream, None) for stream in streams]
    if any(item is None for item in ahead):
        raise RecordError(f"data set {ahead.index(None) + 1} has no record left to mix; use --mix_strategy concat")
    is_exhausted = [False] * len(openers)
    has_ended = any if strategy == "interleave_under" else all
    for draw, number in enumerate(draw_sources(len(openers), probabilities, seed), 1):
        yield number, ahead[number]
        ahead[number] = next(streams[number], None)
        if ahead[number] is None:
            is_exhausted[number] = True
            streams[number] = openers[number]()
            ahead[number] = next(streams[number])
        is_round_complete = probabilities is not None or draw % len(openers) == 0
        if is_round_complete and has_ended(is_exhausted):
            return


def pack_stream(documents: Iterator[np.ndarray], capacity: int) -> Iterator[np.ndarray]:
    """Tokens of the blocks that `PackedDataset` cuts: nothing is dropped, the last one is as short as it comes."""
    held = np.empty(0, dtype=np.int32)
    for document in documents:
        held = np.concatenate([held, document])
        whole = len(held) // capacity * capacity
        yield from held[:whole].reshape(-1, capacity).copy()
        held = held[whole:]
    if len(held):
        yield held


def shuffle_in_buffer(rows: Iterator[Any], size: int, generator: np.random.Generator) -> Iterator[Any]:
    """Every row once, each drawn from the `size` that are held at a time."""
    held = list(itertools.islice(rows, size))
    for row in rows:
        place = int(generator.integers(len(held)))
        yield held[place]
        held[place] = row
    yield from (held[place] for place in generator.permutation(len(held)))


def build_streamed_data(
    data: DataArguments,
    settings: RowSettings,
    tokenizer: ChatTokenizer,
    seed: int,
    *,
    show_progress: bool | None = None,
) -> StageData:
    """What `build_stage_data` returns with --streaming: `train` is a `StreamedRows`, `validation` is in memory.

    `--val_size` is a number of rows (pt: documents) at the start of the data, the same from each data set (the first
    ones give one more where that does not come out even).

    Raises:
        ValueError: --val_size is a share, whose number of rows nobody knows before everything was read.
        RecordError: As `build_stage_data`.
    """
    train, validation = open_sources(data, settings.stage)
    probabilities = parse_probabilities(data.interleave_probs, len(train), data.mix_strategy)
    if 0 < data.val_size < 1:
        raise ValueError(
            f"--val_size {data.val_size:g} is a share, and --streaming does not know how many rows there are; give a "
            "number of rows"
        )
    skipped = [0] * len(train)
    if data.val_size:
        wanted = _share_out(int(data.val_size), len(train))
        skipped = [_count_records(each, rows, tokenizer, settings) for each, rows in zip(train, wanted)]
        held_out = [FirstRecords(each.records, count) for each, count in zip(train, skipped) if count]
        validation = [NamedSource(f"{each.name} (held out)", first) for each, first in zip(train, held_out)]
    options = {"num_workers": data.preprocessing_num_workers, "show_progress": show_progress}
    sets = [build_rows(each.records, tokenizer, settings, **options) for each in validation]
    rows = concatenate(sets)
    if settings.stage == "pt":
        rows = pack(rows, tokenizer, settings.max_seq_length)
    streamed = StreamedRows(
        train,
        tokenizer,
        settings,
        strategy=data.mix_strategy,
        probabilities=probabilities,
        seed=seed,
        buffer_size=data.buffer_size,
        skipped=skipped,
    )
    names = ", ".join(each.name for each in train)
    lines = [describe(list(zip(validation, sets)), data, settings.stage, None, rows)] if sets else []
    unit = "blocks" if settings.stage == "pt" else "rows"
    how = f", {data.mix_strategy}" if len(train) > 1 else ""
    lines.append(f"train:      {names}: read while training{how}, shuffled among {data.buffer_size:,} {unit}")
    return StageData(streamed, rows, "\n".join(lines))


def _share_out(total: int, count: int) -> list[int]:
    return [total // count + (number < total % count) for number in range(count)]


def _count_records(source: NamedSource, rows: int, tokenizer: ChatTokenizer, settings: RowSettings) -> int:
    """How many good records at the start of a source make so many rows.

    Raises:
        RecordError: They are all there is, or not enough.
    """
    if not rows:
        return 0
    found = 0
    for count, located in enumerate(source.records.iterate_located(), 1):
        if found == rows:
            return count - 1
        found += settings.render(tokenizer, located.value).problem is None
    raise RecordError(
        f"--val_size would hold out {rows} rows of {source.name}, which leaves nothing to train on; make it smaller"
    )
