"""How sure a share is, and whether two candidates differ on the same questions.

Exercised by `python -m pytest tests/test_evaluation_report.py`.
"""

import math
import random
from collections.abc import Sequence

Z95 = 1.959964
RESAMPLES = 2000


def wilson_interval(successes: int, trials: int, z: float = Z95) -> tuple[float, float]:
    """95 % interval of a share (E. B. Wilson, 1927), which stays inside 0..1 and is not empty at 0 or 1.

    Raises:
        ValueError: there were no trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise ValueError(f"{successes} successes in {trials} trials is no share")
    share = successes / trials
    scale = 1 + z * z / trials
    middle = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, middle - half), min(1.0, middle + half)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p of McNemar's test: could both candidates be equally good?

    Args:
        only_first: questions that only the first candidate answered right.
        only_second: those that only the second did. What both or neither did says nothing.
    """
    differing = only_first + only_second
    if differing == 0:
        return 1.0
    fewer = min(only_first, only_second)
    tail = sum(math.comb(differing, k) for k in range(fewer + 1)) / 2**differing
    return min(1.0, 2 * tail)


def bootstrap_difference(
    first: Sequence[float], second: Sequence[float], clusters: Sequence[int], seed: int = 0
) -> tuple[float, float]:
    """95 % interval of mean(second) - mean(first), from resampled conversations (percentile bootstrap).

    Args:
        first, second: the two candidates' scores of the same questions, in the same order.
        clusters: the conversation that each question is from: questions of one are drawn together, because an early
            mistake spoils the later replies.
    """
    if not len(first) == len(second) == len(clusters) or not first:
        raise ValueError(f"{len(first)}, {len(second)} and {len(clusters)} scores do not pair up")
    sums: dict[int, list[float]] = {}
    for a, b, cluster in zip(first, second, clusters):
        total = sums.setdefault(cluster, [0.0, 0])
        total[0] += b - a
        total[1] += 1
    pairs = list(sums.values())
    draw = random.Random(seed)
    means = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(pairs, k=len(pairs))
        means.append(sum(total for total, _ in chosen) / sum(count for _, count in chosen))
    means.sort()
    return means[int(0.025 * RESAMPLES)], means[int(0.975 * RESAMPLES) - 1]
