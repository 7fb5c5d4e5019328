"""Rows that know their numbers, so that a batch which cannot be trained on can be named."""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from finetune_chatmodel_demo.conversation.records import RecordError
from finetune_chatmodel_demo.conversation.rendering import IGNORED_LABEL

ADDED = ("row_index", "token_counts")  # by NumberedCollator


class NumberedRows(Dataset):
    """A dataset whose items know their index, so that a bad batch can be named."""

    def __init__(self, rows: Any) -> None:
        self.rows = rows
        self.lengths: list[int] = rows.lengths

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.rows[index], "row_index": index, "row_length": self.lengths[index]}


class NumberedStream(IterableDataset):
    """The same for rows that are read while training, pass after pass without end.

    Trainer cannot tell passes apart whose length it does not know: a resumed run would begin with the first again.
    """

    def __init__(self, rows: Any) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[dict[str, Any]]:
        index = 0
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            before = index
            for row in self.rows:
                yield {**row, "row_index": index, "row_length": len(row["input_ids"])}
                index += 1
            if index == before:
                raise RecordError(f"no row is left to train on: {self.rows.report}")


class NumberedCollator:
    """Pads with another collator and adds `row_index` (B,) and `token_counts` (B, 2): all, supervised.

    Only the sums of `token_counts` over a batch mean something: the first row has all supervised tokens.
    """

    def __init__(self, collate: Callable[[list[dict]], dict[str, torch.Tensor]]) -> None:
        self.collate = collate

    def __call__(self, items: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        added = ("row_index", "row_length")
        batch = self.collate([{key: item[key] for key in item if key not in added} for item in items])
        counts = torch.tensor([[item["row_length"], 0] for item in items])
        counts[0, 1] = (batch["labels"][:, 1:] != IGNORED_LABEL).sum() if "labels" in batch else counts[:, 0].sum()
        batch["row_index"] = torch.tensor([item["row_index"] for item in items])
        batch["token_counts"] = counts
        return batch


def number_rows(rows: Any | None) -> NumberedRows | NumberedStream | None:
    """Rows of either kind, numbered."""
    if rows is None:
        return None
    return NumberedStream(rows) if isinstance(rows, IterableDataset) else NumberedRows(rows)
