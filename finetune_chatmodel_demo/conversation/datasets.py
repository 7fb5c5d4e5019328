"""From a data file to rows of token ids, kept compactly: about five bytes a token, so that a million rows fit.

Use `build_dataset`; look at the rows with `inspect_data.py`.
"""

import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

import numpy as np
from tqdm import tqdm

from finetune_chatmodel_demo.conversation.records import RecordError, RecordFile, read_records
from finetune_chatmodel_demo.conversation.rendering import IGNORED_LABEL, ChatTokenizer
from finetune_chatmodel_demo.conversation.tokenizing import DatasetReport, RenderedChunk, RowSettings, render_chunks
from finetune_chatmodel_demo.conversation.truncation import TruncationStrategy

__all__ = ["ConversationDataset", "DatasetReport", "build_dataset"]


class ConversationDataset:
    """Rows of token ids and labels, map-style: `len(dataset)`, `dataset[row]`.

    An item is `{"input_ids": list[int], "labels": list[int]}`, labels being -100 where the loss does not count.

    Attributes:
        report: What became of the records.
    """

    def __init__(self, records: RecordFile, chunks: Iterable[RenderedChunk]):
        self._records = records
        self.report = DatasetReport(str(records.path))
        input_ids, is_target = array.array("i"), array.array("b")
        lengths, origins = array.array("q"), array.array("q")
        for chunk in chunks:
            self.report.add(chunk.report)
            input_ids.frombytes(chunk.input_ids.tobytes())
            is_target.frombytes(chunk.is_target.tobytes())
            lengths.frombytes(chunk.lengths.tobytes())
            origins.frombytes(chunk.origins.tobytes())
        self.report.rows_bad = records.bad_count
        self._input_ids = np.frombuffer(input_ids, dtype=np.int32)
        self._is_target = np.frombuffer(is_target, dtype=np.bool_)
        self._offsets = np.concatenate([[0], np.cumsum(np.frombuffer(lengths, dtype=np.int64))])
        self._origins = np.frombuffer(origins, dtype=np.int64).reshape(-1, 2)

    def __len__(self) -> int:
        return len(self._origins)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} does not exist; {self._records.path} has {len(self)} rows")
        start, end = self._offsets[row % len(self)], self._offsets[row % len(self) + 1]
        input_ids = self._input_ids[start:end]
        labels = np.where(self._is_target[start:end], input_ids, IGNORED_LABEL)
        return {"input_ids": input_ids.tolist(), "labels": labels.tolist()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, for sampling rows of like length together."""
        return np.diff(self._offsets).tolist()

    def where(self, row: int) -> str:
        """The place of a row's record in its file."""
        number, line = self._origins[row].tolist()
        return self._records.where(number, line)


def build_dataset(
    train_format: Literal["multi-turn", "input-output"],
    path: str | Path,
    tokenizer: ChatTokenizer,
    *,
    max_seq_length: int,
    max_source_length: int,
    max_target_length: int,
    truncation_strategy: TruncationStrategy = "turns",
    on_bad_record: Literal["error", "skip"] = "error",
    num_workers: int | None = None,
    show_progress: bool | None = None,
) -> ConversationDataset:
    """Reads, validates, renders and cuts the records of a file.

    Args:
        train_format: What the records are.
        path: See `read_records`.
        tokenizer: See `ChatTokenizer`; must be picklable where several processes work.
        max_seq_length: Most ids of a multi-turn row.
        max_source_length: Most ids of an input-output prompt, with the two that start the row.
        max_target_length: Most ids of an input-output response, without eos.
        truncation_strategy: See `truncate`. With "official" a cut input-output response is followed by eos.
        on_bad_record: See `read_records`.
        num_workers: Processes that tokenize, where the file has more than IN_PROCESS_ROWS records.
        show_progress: Whether to draw a progress bar on stderr; None: where that is a terminal.

    Raises:
        FileNotFoundError: There is no such file.
        RecordError: A record is bad, or no row is left to train on.
    """
    records = read_records(path, train_format, on_bad_record)
    settings = RowSettings(train_format, max_seq_length, max_source_length, max_target_length, truncation_strategy)
    is_disabled = None if show_progress is None else not show_progress
    with tqdm(desc=f"Tokenizing {records.path.name}", unit=" rows", disable=is_disabled) as bar:
        chunks = render_chunks(records, tokenizer, settings, num_workers or 1)
        dataset = ConversationDataset(records, _count_progress(chunks, bar))
    if not len(dataset):
        raise RecordError(
            f"no row of {path} holds a target: {dataset.report.rows_read} records were read, and in none of them "
            "does a reply lie within the length limit; raise it, or check roles and 'loss'"
        )
    return dataset


def _count_progress(chunks: Iterable[RenderedChunk], bar: tqdm) -> Iterator[RenderedChunk]:
    for chunk in chunks:
        bar.update(chunk.report.rows_read)
        yield chunk
