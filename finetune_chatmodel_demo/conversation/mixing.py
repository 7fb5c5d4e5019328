"""Several data sets as one: one after the other, or drawn in turn; and a part held out for validation.

The order is that of `datasets.interleave_datasets` of the same seed (`interleave_under` is its `first_exhausted`,
`interleave_over` its `all_exhausted`), and the same for rows in memory and for records that are streamed; for these it
is written out here, and tests compare it with `interleave_datasets`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import numpy as np

from finetune_chatmodel_demo.common.errors import UserError

MixStrategy = Literal["concat", "interleave_under", "interleave_over"]
# As many as `datasets` draws at a time: the numbers of a generator depend on it.
DRAWS_AT_A_TIME = 1000
PROBABILITY_TOLERANCE = 1e-6


def parse_probabilities(text: str | None, count: int, strategy: MixStrategy) -> list[float] | None:
    """Reads --interleave_probs.

    Args:
        text: Numbers with commas between them, or None.
        count: How many data sets there are.
        strategy: --mix_strategy.

    Raises:
        UserError: Not as many numbers as data sets, a number that is not above 0, or a sum other than 1.
    """
    if text is None:
        return None
    if strategy == "concat":
        raise UserError(
            "--interleave_probs is for --mix_strategy interleave_under or interleave_over; add one of them, or drop it"
        )
    try:
        probabilities = [float(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--interleave_probs {text!r} is not a list of numbers; write it like 0.7,0.3") from None
    if len(probabilities) != count:
        raise UserError(
            f"--interleave_probs has {len(probabilities)} numbers and there are {count} data sets; give one for each, "
            "in their order"
        )
    if not all(math.isfinite(each) and each > 0 for each in probabilities):
        raise UserError(f"--interleave_probs {text}: every number must be above 0; leave out a data set of share 0")
    if abs(sum(probabilities) - 1) > PROBABILITY_TOLERANCE:
        wanted = ",".join(f"{each / sum(probabilities):.3g}" for each in probabilities)
        raise UserError(f"--interleave_probs {text} add up to {sum(probabilities):g} instead of 1; such as {wanted}")
    return [each / sum(probabilities) for each in probabilities]


def mix_streams(
    openers: Sequence[Callable[[], Iterator[Any]]],
    strategy: MixStrategy,
    probabilities: Sequence[float] | None = None,
    seed: int = 0,
) -> Iterator[tuple[int, Any]]:
    """Mixes streams, whose lengths need not be known.

    `interleave_under` ends as soon as one stream has given all it has, `interleave_over` as soon as every one has, the
    shorter ones beginning anew until then (in a cycle, without probabilities, with every round completed).

    Args:
        openers: Begin a stream, as often as they are called.
        strategy: "concat", "interleave_under" or "interleave_over".
        probabilities: Of the streams; None: they take turns.
        seed: Of the draw.

    Yields:
        Number of the stream, and what it gave.

    Raises:
        UserError: A stream that is to be interleaved gives nothing.
    """
    if strategy == "concat":
        for number, opener in enumerate(openers):
            yield from ((number, item) for item in opener())
        return
    streams = [opener() for opener in openers]
    # One item ahead: a stream counts as exhausted with its last item, not with the attempt to read on.
    ahead = [next(stream, None) for stream in streams]
    if any(item is None for item in ahead):
        raise UserError(f"data set {ahead.index(None) + 1} has no record left to mix; use --mix_strategy concat")
    is_exhausted = [False] * len(openers)
    has_ended = any if strategy == "interleave_under" else all
    for draw, number in enumerate(_draw_turns(len(openers), probabilities, seed), 1):
        yield number, ahead[number]
        ahead[number] = next(streams[number], None)
        if ahead[number] is None:
            is_exhausted[number] = True
            streams[number] = openers[number]()
            ahead[number] = next(streams[number])
        is_round_complete = probabilities is not None or draw % len(openers) == 0
        if is_round_complete and has_ended(is_exhausted):
            return


def _draw_turns(count: int, probabilities: Sequence[float] | None, seed: int) -> Iterator[int]:
    """Yields without end whose turn it is: in a cycle, or at random with `probabilities`."""
    generator = np.random.default_rng(seed)
    while True:
        if probabilities is None:
            yield from range(count)
        else:
            yield from generator.choice(count, size=DRAWS_AT_A_TIME, p=probabilities).tolist()


def mix_order(
    parts: Sequence[np.ndarray], strategy: MixStrategy, probabilities: Sequence[float] | None = None, seed: int = 0
) -> np.ndarray:
    """(rows,) int64: the rows of each part, mixed as by `mix_streams`."""
    if strategy == "concat":
        return np.concatenate(parts)
    openers = [lambda part=part: map(int, part) for part in parts]
    return np.fromiter((row for _, row in mix_streams(openers, strategy, probabilities, seed)), dtype=np.int64)


def count_held_out(val_size: float, rows: int) -> int:
    """How many rows --val_size asks for.

    Raises:
        UserError: It leaves nothing to validate on or nothing to train on.
    """
    count = max(round(val_size * rows), 1) if val_size < 1 else int(val_size)
    if val_size >= 1 and val_size != count:
        raise UserError(f"--val_size {val_size:g} is neither a share below 1 nor a whole number of rows")
    if count >= rows:
        raise UserError(
            f"--val_size {val_size:g} would hold out {count} of {rows} rows and leave nothing to train on; make it "
            "smaller"
        )
    return count


def draw_held_out(val_size: float, rows: int, seed: int) -> np.ndarray:
    """(rows,) bool, 1 for a row to validate on; each has the same chance.

    Rows are drawn before data sets are mixed: a row that an interleave repeats is never on both sides.

    Raises:
        UserError: See `count_held_out`.
    """
    held_out = np.zeros(rows, dtype=bool)
    if val_size:
        count = count_held_out(val_size, rows)
        held_out[np.random.default_rng(seed).permutation(rows)[:count]] = True
    return held_out
