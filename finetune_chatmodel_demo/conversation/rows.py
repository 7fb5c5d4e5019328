"""Rows of token ids, kept compactly: about five bytes a token, so that a million rows fit into memory.

Each stage has its kind of row: `ConversationDataset` for sft, `DocumentDataset` for pt (`packing` cuts blocks out of
it), `PairDataset` for rm and dpo, `PromptDataset` for ppo. `stage_data` builds what a run needs; `build_dataset` reads
one sft file. Look at the rows with `inspect_data.py`.
"""

import logging
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from finetune_chatmodel_demo.conversation.records import RecordError, RecordSource, read_records
from finetune_chatmodel_demo.conversation.render import (
    IGNORED_LABEL,
    PARTS,
    ChatTokenizer,
    RowSettings,
    TruncationStrategy,
)
from finetune_chatmodel_demo.conversation.row_store import (
    REPORT,
    RowStore,
    find_cache_folder,
    keep_in_files,
    keep_in_memory,
    read_files,
)
from finetune_chatmodel_demo.conversation.tokenizing import DatasetReport, RenderedChunk, render_chunks

logger = logging.getLogger(__name__)

__all__ = [
    "ConversationDataset",
    "DatasetReport",
    "DocumentDataset",
    "PairDataset",
    "PromptDataset",
    "TokenRows",
    "build_dataset",
    "build_rows",
]


class TokenRows:
    """Rows of one or more sequences of token ids, map-style: `len(rows)`, `rows[row]`.

    Attributes:
        parts: Sequences that a row has.
        report: What became of the records.
    """

    parts = 1

    def __init__(self, records: RecordSource, store: RowStore):
        self._records = records
        self.report = store.report
        self._input_ids, self._is_target, self._origins = store.input_ids, store.is_target, store.origins
        # Part p of row r is between offsets[r * parts + p] and the next one.
        self._offsets = np.concatenate([[0], np.cumsum(store.lengths)])

    def __len__(self) -> int:
        return len(self._origins)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        spans = [self._span(row, part) for part in range(self.parts)]
        is_target = self._is_target[spans[0].start : spans[-1].stop]
        return self.make_item([self._input_ids[span] for span in spans], is_target)

    @staticmethod
    def make_item(parts: list[np.ndarray], is_target: np.ndarray) -> dict[str, list[int]]:
        """A row as a trainer takes it; each kind of row says how.

        Args:
            parts: int32 ids of each sequence.
            is_target: (T,) bool over all of them, 1 where the loss counts.
        """
        raise NotImplementedError

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row, for sampling rows of like length together."""
        return self.part_lengths.sum(axis=1).tolist()

    @property
    def part_lengths(self) -> np.ndarray:
        """(rows, parts): tokens of each sequence."""
        return np.diff(self._offsets).reshape(-1, self.parts)

    def count_tokens(self, rows: np.ndarray | None = None) -> tuple[int, int]:
        """Tokens of some rows (None: of all), and how many of them the loss counts on."""
        if rows is None:
            return self.report.tokens_total, self.report.tokens_supervised
        starts = self._offsets[: -1 : self.parts]
        supervised = np.add.reduceat(self._is_target, starts, dtype=np.int64)
        return int(self.part_lengths.sum(axis=1)[rows].sum()), int(supervised[rows].sum())

    def where(self, row: int) -> str:
        """The place of a row's record in its file."""
        number, line = self._origins[row].tolist()
        return self._records.where(number, line)

    def ids(self, row: int, part: int = 0) -> np.ndarray:
        """(T,) int32: the ids of one sequence of a row."""
        return self._input_ids[self._span(row, part)]

    def _span(self, row: int, part: int) -> slice:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} does not exist; {self._records.path} has {len(self)} rows")
        index = row % len(self) * self.parts + part
        return slice(self._offsets[index], self._offsets[index + 1])


class ConversationDataset(TokenRows):
    """Rows of sft.

    An item is `{"input_ids": list[int], "labels": list[int]}`, labels being -100 where the loss does not count.
    """

    @staticmethod
    def make_item(parts: list[np.ndarray], is_target: np.ndarray) -> dict[str, list[int]]:
        """See `TokenRows`."""
        labels = np.where(is_target, parts[0], IGNORED_LABEL)
        return {"input_ids": parts[0].tolist(), "labels": labels.tolist()}


class DocumentDataset(ConversationDataset):
    """Whole documents for pt, each ending with eos; `PackedDataset` cuts blocks out of them."""


class PairDataset(TokenRows):
    """Rows of rm and dpo.

    An item is `{"prompt_ids", "chosen_ids", "rejected_ids"}`, lists of ids. What a model reads is prompt + reply;
    `lengths` are those of the longer of the two.
    """

    parts = PARTS["dpo"]

    @staticmethod
    def make_item(parts: list[np.ndarray], is_target: np.ndarray) -> dict[str, list[int]]:
        """See `TokenRows`."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids")
        return {name: part.tolist() for name, part in zip(names, parts, strict=True)}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row's prompt with the longer reply."""
        lengths = self.part_lengths
        return (lengths[:, 0] + lengths[:, 1:].max(axis=1)).tolist()


class PromptDataset(TokenRows):
    """Rows of ppo.

    An item is `{"input_ids": prompt, "labels": reference reply}`; the reference is `[]` where the data has none.
    `lengths` are the prompts'.
    """

    parts = PARTS["ppo"]

    @staticmethod
    def make_item(parts: list[np.ndarray], is_target: np.ndarray) -> dict[str, list[int]]:
        """See `TokenRows`."""
        prompt, reference = parts
        return {"input_ids": prompt.tolist(), "labels": reference.tolist()}

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row's prompt."""
        return self.part_lengths[:, 0].tolist()


DATASETS = {
    "pt": DocumentDataset,
    "sft": ConversationDataset,
    "rm": PairDataset,
    "dpo": PairDataset,
    "ppo": PromptDataset,
}
# What to do where no record became a row, by stage.
NO_ROW = {
    "sft": "holds a target: {} records were read, and in none of them does a reply lie within the length limit; raise "
    "it, or check roles and 'loss'",
    **dict.fromkeys(
        ("rm", "dpo"),
        "is left: {} records were read, and in none of them do question and replies fit into --max_seq_length; raise "
        "it",
    ),
    "ppo": "is left: {} records were read, and in none of them does the newest question fit into --max_seq_length; "
    "raise it",
}


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
    """Reads, validates, renders and cuts the records of a file, for sft.

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
    return build_rows(records, tokenizer, settings, num_workers=num_workers, show_progress=show_progress)


def build_rows(
    records: RecordSource,
    tokenizer: ChatTokenizer,
    settings: RowSettings,
    *,
    num_workers: int | None = None,
    show_progress: bool | None = None,
    tokenized_cache: str | None = "none",
) -> Any:
    """Renders the records of one source into the kind of rows that the stage of `settings` has.

    Arguments and errors are those of `build_dataset`; `tokenized_cache`: see `find_cache_folder`.
    """
    folder = find_cache_folder(tokenized_cache, records, tokenizer, settings)
    if folder is not None and (folder / REPORT).is_file():
        store = read_files(folder)
        records.bad_count, records.bad_messages = store.report.rows_bad, store.bad_messages
        logger.info("%s was tokenized before: its rows are read from %s", records.path, folder)
    else:
        store = _render(records, tokenizer, settings, num_workers or 1, show_progress, folder)
        if folder is not None:
            logger.info("the rows of %s are kept in %s for later runs", records.path, folder)
    dataset = DATASETS[settings.stage](records, store)
    if not len(dataset):
        reason = NO_ROW[settings.stage].format(dataset.report.rows_read)
        raise RecordError(f"no row of {records.path} {reason}")
    return dataset


def _render(
    records: RecordSource,
    tokenizer: ChatTokenizer,
    settings: RowSettings,
    num_workers: int,
    show_progress: bool | None,
    folder: Path | None,
) -> RowStore:
    is_disabled = None if show_progress is None else not show_progress
    with tqdm(desc=f"Tokenizing {Path(records.path).name}", unit=" rows", disable=is_disabled) as bar:
        chunks = _count_progress(render_chunks(records, tokenizer, settings, num_workers), bar)
        return keep_in_memory(records, chunks) if folder is None else keep_in_files(records, chunks, folder)


def _count_progress(chunks: Iterable[RenderedChunk], bar: tqdm) -> Iterator[RenderedChunk]:
    for chunk in chunks:
        bar.update(chunk.report.rows_read)
        yield chunk
