"""Intervals of medians hold them as often as they say."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_trimix.measurement.intervals import CONFIDENCE, MIN_SAMPLES, interval_confidence, median_interval


@pytest.mark.parametrize("count", [3, 5, 6, 7, 8, 9, 12])
def test_they_hold_the_median_as_often_as_they_say(count: int) -> None:
    generator = random.Random(count)
    draws = 4000
    hits = 0
    for _ in range(draws):
        # Skewed, as timings are; its median is 1.
        low, high = median_interval([generator.lognormvariate(0, 0.3) for _ in range(count)])
        hits += low <= 1 <= high
    confidence = interval_confidence(count)
    assert abs(hits / draws - confidence) <= 4 * math.sqrt(confidence * (1 - confidence) / draws)
    assert (confidence >= CONFIDENCE) is (count >= MIN_SAMPLES)


@given(st.lists(st.floats(min_value=0.2, max_value=5.0), min_size=1, max_size=40))
def test_they_are_of_the_median(values: list[float]) -> None:
    low, high = median_interval(values)
    assert low <= statistics.median(values) <= high
    assert low in values
    assert high in values
    assert median_interval(values[::-1]) == (low, high)


def test_they_are_as_narrow_as_they_may_be() -> None:
    assert median_interval([1.0, 2.0, 3.0, 4.0, 100.0]) == (1.0, 100.0)
    assert interval_confidence(5) == 0.9375
    # Of nine, the second and the eighth: 1 - 2 (1 + 9) / 512.
    assert median_interval(list(map(float, range(1, 10)))) == (2.0, 8.0)
    assert interval_confidence(9) == pytest.approx(0.9609, abs=1e-4)
    assert interval_confidence(1) == 0
    with pytest.raises(ValueError, match="none given"):
        median_interval([])
