"""Intervals of measured figures, by bootstrap: no assumption on how timings scatter."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Sequence
from typing import TypeVar

Sample = TypeVar("Sample")


def bootstrap_interval(
    statistic: Callable[[list[Sample]], float], samples: Sequence[Sample], *, draws: int = 2000
) -> tuple[float, float]:
    """95% percentile-bootstrap interval of a statistic; the same for the same samples.

    Args:
        statistic: Of a resampled list, as long as ``samples``.
        samples: What was measured; whole rounds where a statistic compares what was measured together.
        draws: Resamples.

    Raises:
        ValueError: No samples.
    """
    if not samples:
        raise ValueError("samples: none given; an interval needs at least one")
    generator = random.Random(0)
    drawn = sorted(statistic(generator.choices(samples, k=len(samples))) for _ in range(draws))
    return drawn[int(0.025 * draws)], drawn[int(0.975 * draws)]


def median_interval(values: Sequence[float], *, draws: int = 2000) -> tuple[float, float]:
    """95% percentile-bootstrap interval of the median.

    Raises:
        ValueError: No values.
    """
    return bootstrap_interval(statistics.median, values, draws=draws)
