"""Renders records into chunks of rows, in this process or in several; `datasets` puts the chunks together."""

import itertools
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass

import numpy as np

from finetune_chatmodel_demo.conversation.json_files import Located
from finetune_chatmodel_demo.conversation.records import RecordSource
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL, PARTS, ChatTokenizer, Row, RowSettings

__all__ = ["DatasetReport", "RenderedChunk", "RowSettings", "render_chunks"]

CHUNK_ROWS = 256
# Up to here one process is faster: measured, 0.1 ms a row of 80 tokens, and 5 to 10 s until others have started.
IN_PROCESS_ROWS = 50_000
CHUNKS_IN_FLIGHT = 4
# Not forked: a fork of a process that runs threads (PyTorch's, a progress bar's) can hang.
START_METHOD = "spawn"


@dataclass
class DatasetReport:
    """What became of the records of one file or data set; `str()` is the line to print.

    Attributes:
        rows_read: Valid records.
        rows_bad: Bad records that were skipped.
        rows_kept: Rows of the dataset.
        rows_dropped_masked: Records without a target.
        rows_dropped_long: Records of which the length limit leaves no target, or whose newest question does not fit
            into it together with the replies.
        rows_cut: Kept rows that lack something because of a length limit.
        rows_cut_inside: Those of them that end inside a turn, or hold a cut prompt or response.
        turns_kept: Turns in the kept rows (0 for input-output).
        turns_dropped: Whole turns that the kept rows lack.
        tokens_total: Tokens of the kept rows.
        tokens_supervised: Those of them that are targets.
    """

    path: str
    rows_read: int = 0
    rows_bad: int = 0
    rows_kept: int = 0
    rows_dropped_masked: int = 0
    rows_dropped_long: int = 0
    rows_cut: int = 0
    rows_cut_inside: int = 0
    turns_kept: int = 0
    turns_dropped: int = 0
    tokens_total: int = 0
    tokens_supervised: int = 0

    def __str__(self) -> str:
        share = self.tokens_supervised / max(1, self.tokens_total)
        return (
            f"{self.path}: {self.rows_kept:,} rows of {self.rows_read + self.rows_bad:,} records "
            f"({self.rows_bad:,} bad, {self.rows_dropped_masked:,} dropped without a target"
            f"{f', {self.rows_dropped_long:,} too long' if self.rows_dropped_long else ''}; "
            f"{self.rows_cut:,} rows cut, {self.rows_cut_inside:,} of them inside a turn, "
            f"{self.turns_dropped:,} turns left out); "
            f"{self.tokens_total:,} tokens, {share:.1%} supervised"
        )

    def count(self, row: Row) -> bool:
        """Counts what became of one record, except for its tokens; returns whether the row is kept."""
        self.rows_read += 1
        if row.problem is not None:
            self.rows_dropped_masked += row.problem == "masked"
            self.rows_dropped_long += row.problem == "long"
            return False
        self.rows_kept += 1
        self.rows_cut += row.is_cut_inside or row.turns_dropped > 0
        self.rows_cut_inside += row.is_cut_inside
        self.turns_kept += row.turns_kept
        self.turns_dropped += row.turns_dropped
        return True

    def add(self, other: "DatasetReport") -> None:
        """Adds the counts of another part of the same file."""
        for name, value in asdict(other).items():
            if name != "path":
                setattr(self, name, getattr(self, name) + value)


@dataclass(frozen=True)
class RenderedChunk:
    """Rows one after the other.

    `input_ids` (tokens,) int32; `is_target` (tokens,) bool, 1 where the loss counts; `lengths` (rows, parts) int64;
    `origins` (rows, 2) int64, number and line of each row's record.
    """

    input_ids: np.ndarray
    is_target: np.ndarray
    lengths: np.ndarray
    origins: np.ndarray
    report: DatasetReport


def render_chunks(
    records: RecordSource, tokenizer: ChatTokenizer, settings: RowSettings, num_workers: int
) -> Iterator[RenderedChunk]:
    """Renders in this process, and where there are to be several, in others from row IN_PROCESS_ROWS on."""
    located = records.iterate_located()
    first_rows = itertools.islice(located, IN_PROCESS_ROWS) if num_workers > 1 else located
    for chunk in _batched(first_rows, CHUNK_ROWS):
        yield _render_chunk(tokenizer, settings, chunk)
    next_row = next(located, None)
    if next_row is not None:
        chunks = _batched(itertools.chain([next_row], located), CHUNK_ROWS)
        yield from _render_in_processes(chunks, tokenizer, settings, num_workers)


def _render_in_processes(
    chunks: Iterator[list[Located]], tokenizer: ChatTokenizer, settings: RowSettings, num_workers: int
) -> Iterator[RenderedChunk]:
    """Keeps a few chunks a worker under way, in order, so that neither records nor rows pile up."""
    context = multiprocessing.get_context(START_METHOD)
    with ProcessPoolExecutor(num_workers, context, _start_worker, (tokenizer, settings)) as pool:
        under_way = deque()
        try:
            for chunk in chunks:
                under_way.append(pool.submit(_render_chunk_in_worker, chunk))
                if len(under_way) >= num_workers * CHUNKS_IN_FLIGHT:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            raise RuntimeError(
                f"one of {num_workers} tokenizing processes died, perhaps for want of memory; "
                "try --preprocessing_num_workers 1"
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


_worker_state: tuple[ChatTokenizer, RowSettings]


def _start_worker(tokenizer: ChatTokenizer, settings: RowSettings) -> None:
    global _worker_state
    _worker_state = (tokenizer, settings)


def _render_chunk_in_worker(chunk: list[Located]) -> RenderedChunk:
    return _render_chunk(*_worker_state, chunk)


def _render_chunk(tokenizer: ChatTokenizer, settings: RowSettings, chunk: list[Located]) -> RenderedChunk:
    report = DatasetReport(path="")
    kept: list[tuple[Located, Row]] = []
    for located in chunk:
        row = settings.render(tokenizer, located.value)
        if report.count(row):
            kept.append((located, row))
    ids = itertools.chain.from_iterable(itertools.chain.from_iterable(row.parts for _, row in kept))
    input_ids = np.fromiter(ids, dtype=np.int32)
    labels = np.fromiter(itertools.chain.from_iterable(row.labels for _, row in kept), dtype=np.int32)
    is_target = labels != IGNORED_LABEL
    report.tokens_total, report.tokens_supervised = len(input_ids), int(is_target.sum())
    lengths = np.array([[len(part) for part in row.parts] for _, row in kept], dtype=np.int64)
    origins = np.array([(located.number, located.line) for located, _ in kept], dtype=np.int64)
    return RenderedChunk(input_ids, is_target, lengths.reshape(-1, PARTS[settings.stage]), origins, report)


def _batched(items: Iterable[Located], size: int) -> Iterator[list[Located]]:
    """Lists of `size` items (itertools.batched needs Python 3.12)."""
    iterator = iter(items)
    while batch := list(itertools.islice(iterator, size)):
        yield batch
