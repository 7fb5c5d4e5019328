"""Several data sets as one: one after the other, or drawn in turn; and a part held out for validation.

The order is that of `datasets.interleave_datasets` of the same seed, index by index (`interleave_under` is its
`first_exhausted`, `interleave_over` its `all_exhausted`). Tested by `pytest tests/test_stage_data.py`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from finetune_chatmodel_demo.conversation.tokenizing import DatasetReport

MixStrategy = Literal["concat", "interleave_under", "interleave_over"]
# As many as `datasets` draws at a time: the numbers of a generator depend on it.
DRAWS_AT_A_TIME = 1000
PROBABILITY_TOLERANCE = 1e-6


class RowView:
    """Some rows of some data sets in some order, as one data set. No row is copied.

    Attributes:
        datasets: The data sets.
        order: (rows, 2) int64: data set and row of each row of the view.
    """

    def __init__(self, datasets: Sequence[Any], order: np.ndarray):
        self.datasets, self.order = list(datasets), order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, row: int) -> dict[str, list[int]]:
        dataset, index = self._locate(row)
        return dataset[index]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        lengths = [np.asarray(dataset.lengths, dtype=np.int64) for dataset in self.datasets]
        starts = np.cumsum([0, *map(len, lengths)])[:-1]
        return np.concatenate(lengths)[starts[self.order[:, 0]] + self.order[:, 1]].tolist()

    @property
    def report(self) -> DatasetReport:
        """The sums of the data sets' reports, but for the rows and tokens, which are the view's."""
        report = replace(self.datasets[0].report)
        for dataset in self.datasets[1:]:
            report.add(dataset.report)
            report.path += f", {dataset.report.path}"
        report.rows_kept = len(self)
        report.tokens_total, report.tokens_supervised = self.count_tokens()
        return report

    def count_tokens(self) -> tuple[int, int]:
        """Tokens of the rows, and how many of them the loss counts on."""
        counts = [
            dataset.count_tokens(self.order[self.order[:, 0] == number, 1])
            for number, dataset in enumerate(self.datasets)
        ]
        return sum(total for total, _ in counts), sum(supervised for _, supervised in counts)

    def where(self, row: int) -> str:
        """The place of a row's record in its file."""
        dataset, index = self._locate(row)
        return dataset.where(index)

    def ids(self, row: int, part: int = 0) -> np.ndarray:
        """(T,) int32: the ids of one sequence of a row."""
        dataset, index = self._locate(row)
        return dataset.ids(index, part)

    def _locate(self, row: int) -> tuple[Any, int]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} does not exist; there are {len(self)} rows")
        number, index = self.order[row].tolist()
        return self.datasets[number], index


def parse_probabilities(text: str | None, count: int, strategy: MixStrategy) -> list[float] | None:
    """Reads --interleave_probs.

    Args:
        text: Numbers with commas between them, or None.
        count: How many data sets there are.
        strategy: --mix_strategy.

    Raises:
        ValueError: Not as many numbers as data sets, a number that is not above 0, or a sum other than 1.
    """
    if text is None:
        return None
    if strategy == "concat":
        raise ValueError(
            "--interleave_probs is for --mix_strategy interleave_under or interleave_over; add one of them, or drop it"
        )
    try:
        probabilities = [float(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--interleave_probs {text!r} is not a list of numbers; write it like 0.7,0.3") from None
    if len(probabilities) != count:
        raise ValueError(
            f"--interleave_probs has {len(probabilities)} numbers and there are {count} data sets; give one for each, "
            "in their order"
        )
    if not all(math.isfinite(each) and each > 0 for each in probabilities):
        raise ValueError(f"--interleave_probs {text}: every number must be above 0; leave out a data set of share 0")
    if abs(sum(probabilities) - 1) > PROBABILITY_TOLERANCE:
        wanted = ",".join(f"{each / sum(probabilities):.3g}" for each in probabilities)
        raise ValueError(f"--interleave_probs {text} add up to {sum(probabilities):g} instead of 1; such as {wanted}")
    return [each / sum(probabilities) for each in probabilities]


def draw_sources(count: int, probabilities: Sequence[float] | None, seed: int) -> Iterator[int]:
    """Yields without end whose turn it is: in a cycle, or at random with `probabilities`."""
    generator = np.random.default_rng(seed)
    while True:
        if probabilities is None:
            yield from range(count)
        else:
            yield from generator.choice(count, size=DRAWS_AT_A_TIME, p=probabilities).tolist()


def mix_order(
    lengths: Sequence[int], strategy: MixStrategy, probabilities: Sequence[float] | None = None, seed: int = 0
) -> np.ndarray:
    """The order of the mixed rows.

    `interleave_under` ends as soon as one data set has given all its rows, `interleave_over` as soon as every one
    has, the shorter ones beginning anew until then (in a cycle, without probabilities, with every round completed).

    Args:
        lengths: Rows of each data set; none may be empty in an interleave.
        strategy: "concat", "interleave_under" or "interleave_over".
        probabilities: Of the data sets; None: they take turns.
        seed: Of the draw.

    Returns:
        (rows, 2) int64: data set and row.
    """
    if strategy == "concat":
        pairs = [
            np.stack([np.full(length, number), np.arange(length)], axis=1) for number, length in enumerate(lengths)
        ]
        return np.concatenate(pairs).astype(np.int64)
    sizes = np.asarray(lengths, dtype=np.int64)
    if probabilities is None:
        rounds = sizes.min() if strategy == "interleave_under" else sizes.max()
        draws = np.tile(np.arange(len(sizes)), int(rounds))
    else:
        draws = _draw_until_exhausted(sizes, strategy, probabilities, seed)
    order = np.empty((len(draws), 2), dtype=np.int64)
    order[:, 0] = draws
    for number, size in enumerate(sizes):
        places = np.flatnonzero(draws == number)
        order[places, 1] = np.arange(len(places)) % size
    return order


def _draw_until_exhausted(
    sizes: np.ndarray, strategy: MixStrategy, probabilities: Sequence[float], seed: int
) -> np.ndarray:
    """(rows,) the data set of each row, up to the one with which the first / the last data set is complete."""
    generator = np.random.default_rng(seed)
    blocks, counts = [], np.zeros(len(sizes), dtype=np.int64)
    has_ended = np.any if strategy == "interleave_under" else np.all
    while not has_ended(counts >= sizes):
        blocks.append(generator.choice(len(sizes), size=DRAWS_AT_A_TIME, p=probabilities))
        counts += np.bincount(blocks[-1], minlength=len(sizes))
    draws = np.concatenate(blocks)
    complete = [np.flatnonzero(draws == number) for number in range(len(sizes))]
    ends = [places[size - 1] for places, size in zip(complete, sizes) if len(places) >= size]
    return draws[: (min(ends) if strategy == "interleave_under" else max(ends)) + 1]


def count_held_out(val_size: float, rows: int) -> int:
    """How many rows --val_size asks for.

    Raises:
        ValueError: It leaves nothing to validate on or nothing to train on.
    """
    count = round(val_size * rows) if val_size < 1 else int(val_size)
    if val_size >= 1 and val_size != count:
        raise ValueError(f"--val_size {val_size:g} is neither a share below 1 nor a whole number of rows")
    count = max(count, 1) if val_size < 1 else count
    if count >= rows:
        raise ValueError(
            f"--val_size {val_size:g} would hold out {count} of {rows} rows and leave nothing to train on; make it "
            "smaller"
        )
    return count


def split_rows(lengths: Sequence[int], val_size: float, seed: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Draws rows to validate on out of all data sets together, each row with the same chance.

    Rows are drawn before data sets are mixed: a row that an interleave repeats is never on both sides.

    Args:
        lengths: Rows of each data set.
        val_size: A share below 1, or a number of rows.
        seed: Of the draw.

    Returns:
        The rows that each data set keeps for training, in their order, and (rows, 2) those held out.

    Raises:
        ValueError: See `count_held_out`.
    """
    order = mix_order(lengths, "concat")
    held_out = np.zeros(len(order), dtype=bool)
    count = count_held_out(val_size, len(order))
    held_out[np.random.default_rng(seed).permutation(len(order))[:count]] = True
    kept = [order[(order[:, 0] == number) & ~held_out, 1] for number in range(len(lengths))]
    return kept, order[held_out]
