"""Rows that are read while training goes on, for data that memory cannot hold (`--streaming`).

One pass over `StreamedRows` gives the rows that the data sets in memory would have, each once, in another order:
`--buffer_size` rows are held, and the next one is drawn from these by a seed and the epoch. What is held at a time is
that buffer and one record of each data set.

Data sets are mixed record by record, before rendering. The workers of a DataLoader share the mixed records out among
them, without overlap; each then packs (pt) and shuffles its own. (`datasets.IterableDataset` gives a worker whole files
only: of one file all workers but the first would get nothing.) Several processes share rows out through accelerate's
`IterableDatasetShard`: every process reads all records and keeps its part (`dispatch_batches` must be off, since rows
of different lengths cannot be sent around as one tensor).
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from finetune_chatmodel_demo.common.errors import UserError
from finetune_chatmodel_demo.conversation.mixing import MixStrategy, mix_streams
from finetune_chatmodel_demo.conversation.packing import block_capacity, make_block
from finetune_chatmodel_demo.conversation.records import RecordSource
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL, ChatTokenizer, RowSettings
from finetune_chatmodel_demo.conversation.rows import SEQUENCES, DatasetReport, make_item
from finetune_chatmodel_demo.conversation.text_files import Located


class StreamedRows(IterableDataset):
    """Rows of any stage, read and rendered while they are iterated; items are those of the data sets in memory.

    Attributes:
        reports: What has become of the records so far, for each data set; counted anew in each pass, and only in the
            process that reads (a DataLoader's workers keep their own).
        epoch: Chooses the order; the trainer sets it with `set_epoch`.
    """

    def __init__(
        self,
        sources: Sequence[RecordSource],
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
            sources: The records of each data set.
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
        self.reports = [DatasetReport(str(source.path)) for source in self.sources]

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self.epoch = epoch

    @property
    def report(self) -> DatasetReport:
        """The sum of `reports`."""
        total = DatasetReport(", ".join(report.path for report in self.reports))
        for report in self.reports:
            total.add(report)
        return total

    def __iter__(self) -> Iterator[dict[str, list[int]]]:
        worker = get_worker_info()
        shard, shards = (worker.id, worker.num_workers) if worker else (0, 1)
        generator = np.random.default_rng([self.seed, self.epoch, shard])
        yield from map(self._finish, shuffle_in_buffer(self._rows(shard, shards), self.buffer_size, generator))

    def peek(self, count: int) -> list[dict[str, list[int]]]:
        """The first rows in the order of the files, without reading further than they are.

        Raises:
            UserError: There is none.
        """
        rows = list(map(self._finish, itertools.islice(self._rows(0, 1), count)))
        if not rows:
            raise UserError(f"no row is left to train on: {self.report}")
        return rows

    def _finish(self, row: Any) -> dict[str, list[int]]:
        """A row as a trainer takes it, from what `_rows` gives."""
        if self.settings.stage == "pt":
            return make_block(self.tokenizer.get_prefix_tokens(), row.tolist())
        return make_item(self.settings.stage, {name: values.tolist() for name, values in row.items()})

    def _rows(self, shard: int, shards: int) -> Iterator[Any]:
        """What is shuffled, in five bytes a token: arrays by column; in pt the tokens of a block."""
        rows = self._render(shard, shards)
        if self.settings.stage != "pt":
            return rows
        return pack_stream((row["input_ids"] for row in rows), block_capacity(self.settings.max_seq_length))

    def _render(self, shard: int, shards: int) -> Iterator[dict[str, np.ndarray]]:
        """Every shards-th record, compact."""
        stage, self.reports = self.settings.stage, [DatasetReport(report.path) for report in self.reports]
        openers = [self._opener(number) for number in range(len(self.sources))]
        mixed = mix_streams(openers, self.strategy, self.probabilities, self.seed)
        for number, located in itertools.islice(mixed, shard, None, shards):
            row = self.settings.render(self.tokenizer, located.value)
            self.reports[number].rows_bad = self.sources[number].bad_count
            if self.reports[number].count(row):
                columns = {name: np.asarray(part, dtype=np.int32) for name, part in zip(SEQUENCES[stage], row.parts)}
                if stage == "sft":
                    columns["is_target"] = np.asarray(row.labels) != IGNORED_LABEL
                yield columns
        for source, report in zip(self.sources, self.reports):
            report.rows_bad = source.bad_count

    def _opener(self, number: int) -> Callable[[], Iterator[Located]]:
        return lambda: itertools.islice(self.sources[number].iterate_located(), self.skipped[number], None)


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
