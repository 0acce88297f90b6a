"""Intervals of measured medians that hold for few samples and any distribution."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

CONFIDENCE = 0.95
# The fewest samples whose range holds the median with that confidence.
MIN_SAMPLES = 6


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """95% interval of the median by order statistics: exact for any distribution and any number of values.

    A percentile bootstrap is narrower than it says for so few values: of 7, its 95% interval holds the median in 87 of
    100 cases. Fewer than ``MIN_SAMPLES`` values can't reach 95%: theirs is the whole range, with the confidence that
    ``interval_confidence`` names.

    Raises:
        ValueError: No values.
    """
    if not values:
        raise ValueError("values: none given; an interval needs at least one sample")
    ordered = sorted(values)
    drop = _drop(len(ordered))
    return ordered[drop], ordered[len(ordered) - 1 - drop]


def interval_confidence(count: int) -> float:
    """Probability that ``median_interval`` of this many values holds the true median."""
    return _coverage(count, _drop(count))


@functools.cache
def _drop(count: int) -> int:
    """Values to leave out at either end."""
    drop = 0
    while 2 * (drop + 1) < count and _coverage(count, drop + 1) >= CONFIDENCE:
        drop += 1
    return drop


def _coverage(count: int, drop: int) -> float:
    return max(0.0, 1 - 2 * sum(math.comb(count, index) for index in range(drop + 1)) / 2**count)
