"""What a series of losses says in spite of its noise: has it fallen, does it rise, have gradients vanished?

Plain functions; `diagnosis` turns what they find into warnings. Exercised by `pytest tests/test_diagnosis.py`.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# Standard errors by which a difference must stand out: 2.5% of true differences lie further out on one side.
CERTAINTY = 2.0
# A rise is acted upon, so it must be certain: 4 standard errors, in two windows in a row.
RISE_CERTAINTY = 4.0
RISE_WINDOWS = 2
LEAST_RISE = 0.2  # nats
SHARE_LOST = 0.5  # of what had been gained
SHARE_OF_START = 0.1
GRADIENT_WINDOW = 20
VANISHED_SHARE = 1e-3


@dataclass(frozen=True)
class Improvement:
    """Mean loss of the first third of a series and of its last third; `most` is the share it can have fallen by."""

    before: float
    now: float
    most: float
    third: int

    @property
    def share(self) -> float:
        """The share by which the loss has fallen."""
        return (self.before - self.now) / self.before if self.before else 0.0


@dataclass(frozen=True)
class Rise:
    """Mean losses of windows: of the first, of the lowest and of the newest, and the steps before the lowest."""

    start: float
    lowest: float
    now: float
    lowest_step: int


def measure_improvement(losses: Sequence[float]) -> Improvement:
    """Compares the ends of a series of at least 6 losses.

    Returns:
        `most` is the fall's upper bound: its share plus 2 standard errors of the difference of two means.
    """
    third = len(losses) // 3
    first, last = losses[:third], losses[-third:]
    before, now = statistics.fmean(first), statistics.fmean(last)
    error = math.sqrt((statistics.variance(first) + statistics.variance(last)) / third)
    most = (before - now + CERTAINTY * error) / before if before else 0.0
    return Improvement(before, now, most, third)


def find_rise(losses: Sequence[float], window: int) -> Rise | None:
    """Whether a loss that had been lower has risen for good.

    It has, when the last two windows both lie above the lowest one by half of what had been gained, by a tenth of the
    start, by 0.2 nats, and by 4 standard errors.

    Args:
        losses: of all steps.
        window: steps whose mean counts as one value.
    """
    parts = [losses[i : i + window] for i in range(0, len(losses) - window + 1, window)]
    if len(parts) < RISE_WINDOWS + 1:
        return None
    means = [statistics.fmean(part) for part in parts]
    spread = statistics.median(statistics.stdev(part) for part in parts)
    lowest = min(range(len(means)), key=means.__getitem__)
    least = max(
        SHARE_LOST * (means[0] - means[lowest]),
        SHARE_OF_START * means[0],
        LEAST_RISE,
        RISE_CERTAINTY * spread * math.sqrt(2 / window),
    )
    if all(mean - means[lowest] > least for mean in means[-RISE_WINDOWS:]):
        return Rise(means[0], means[lowest], means[-1], lowest * window)
    return None


def find_vanished(norms: Sequence[float]) -> tuple[float, float] | None:
    """The median gradient norm of the first 20 steps and of the last 20, when the latter is below a thousandth."""
    if len(norms) < 3 * GRADIENT_WINDOW:
        return None
    first, last = statistics.median(norms[:GRADIENT_WINDOW]), statistics.median(norms[-GRADIENT_WINDOW:])
    return (first, last) if last < VANISHED_SHARE * first else None
