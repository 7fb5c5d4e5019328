"""The order of the rows: random, in units of similar length, and a function of seed and epoch alone.

A resumed run must see the rows that the killed one would have seen, so the order never depends on the state of a
random number generator.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from finetune_chatmodel_demo.conversation.records import RecordError
from finetune_chatmodel_demo.conversation.render import IGNORED_LABEL
from finetune_chatmodel_demo.training.arguments import GROUP_BY_LENGTH

UNITS_PER_POOL = 50


class LengthGroupedBatches(Sampler[int]):
    """Yields every row once an epoch; each `unit` consecutive rows are of similar length.

    A unit is what is computed at the same time: one batch on every device. Rows are shuffled, cut into pools of 50
    units, sorted by length within a pool, and the units are shuffled again, so that lengths stay mixed over time.
    """

    def __init__(self, lengths: Sequence[int], unit: int, seed: int, is_grouped: bool = True) -> None:
        """
        Args:
            lengths: tokens of each row.
            unit: rows computed at the same time (batch size × processes).
            seed: of the order.
            is_grouped: False shuffles only.
        """
        self.lengths = lengths
        self.unit = unit
        self.seed = seed
        self.is_grouped = is_grouped
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order; the trainer calls it before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + 1_000_003 * self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        if not self.is_grouped:
            return iter(order)
        pool_size = self.unit * UNITS_PER_POOL
        order = [
            index
            for start in range(0, len(order), pool_size)
            for index in sorted(order[start : start + pool_size], key=lambda i: self.lengths[i], reverse=True)
        ]
        units = [order[start : start + self.unit] for start in range(0, len(order), self.unit)]
        # A last unit that is not full stays last: elsewhere it would shift all that follow.
        last = [units.pop()] if units and len(units[-1]) < self.unit else []
        shuffled = [units[i] for i in torch.randperm(len(units), generator=generator).tolist()]
        if self.epoch == 0 and shuffled:
            # The longest unit first: too little memory shows at once, and not after hours.
            longest = max(range(len(shuffled)), key=lambda i: max(self.lengths[row] for row in shuffled[i]))
            shuffled[0], shuffled[longest] = shuffled[longest], shuffled[0]
        return iter([index for unit in shuffled + last for index in unit])


def order_rows(lengths: Sequence[int], args: Any) -> LengthGroupedBatches | None:
    """The order of a run's training rows; None: as they come, or what the library makes of --train_sampling_strategy.

    Args:
        lengths: tokens of each row.
        args: the run's TrainingArguments.
    """
    if args.train_sampling_strategy not in (GROUP_BY_LENGTH, "random"):
        return None
    seed = args.seed if args.data_seed is None else args.data_seed
    unit = args.train_batch_size * args.world_size
    return LengthGroupedBatches(lengths, unit, seed, is_grouped=args.train_sampling_strategy == GROUP_BY_LENGTH)


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
            if index == before and get_worker_info() is not None:
                return  # fewer rows than workers: those of the other workers go on
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
