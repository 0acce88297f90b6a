"""Paired differences hold what they promise, and divergences are what they say."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vllm_trimix.evaluation.statistics import divergence, mean_difference, paired_difference, shared_prefix


def test_interval_is_bonett_and_prices() -> None:
    """Hand-computed from the 2012 paper's formula for proportions: 50 pairs, 6 lost and 2 won."""
    scores, stock = [0.0] * 6 + [1.0] * 2 + [1.0] * 42, [1.0] * 6 + [0.0] * 2 + [1.0] * 42
    lost, won = 7 / 52, 3 / 52
    spread = 1.959964 * math.sqrt((lost + won - (won - lost) ** 2) / 52)
    found = paired_difference(scores, stock)
    assert found.mean == pytest.approx(-4 / 50)
    assert found.low == pytest.approx(won - lost - spread, abs=1e-6)
    assert found.high == pytest.approx(won - lost + spread, abs=1e-6)
    assert found.verdict == "none seen"


def test_equal_pairs_leave_room() -> None:
    found = paired_difference([1.0] * 20, [1.0] * 20)
    assert found.mean == 0
    assert found.high == pytest.approx(1.959964 * math.sqrt(2) / 22, abs=1e-6)
    assert found.low == -found.high


@pytest.mark.parametrize(("n", "share", "lost"), [(20, 0.9, 0.1), (50, 0.8, 0.05), (20, 1.0, 0.0), (100, 0.5, 0.2)])
def test_interval_holds_the_truth(n: int, share: float, lost: float) -> None:
    """In at least 93 of 100 evaluations, up to what 2000 of them can tell."""
    rng = random.Random(f"{n} {share} {lost}")
    held = 0
    for _ in range(2000):
        stock = [float(rng.random() < share) for _ in range(n)]
        scores = [0.0 if rng.random() < lost else value for value in stock]
        found = paired_difference(scores, stock)
        held += found.low <= -share * lost <= found.high
    assert held >= 2000 * 0.93 - 3 * math.sqrt(2000 * 0.93 * 0.07)


def test_a_real_loss_and_gain_are_seen() -> None:
    assert paired_difference([0.0] * 20, [1.0] * 20).verdict == "loss"
    assert paired_difference([1.0] * 20, [0.0] * 20).verdict == "gain"


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=60))
def test_bounded_and_ordered(pairs: list[tuple[float, float]]) -> None:
    found = paired_difference([a for a, _ in pairs], [b for _, b in pairs])
    assert -1 <= found.low <= found.high <= 1


def test_wants_pairs() -> None:
    with pytest.raises(ValueError, match="none given"):
        paired_difference([], [])
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0], [1.0, 0.0])


def test_mean_difference_is_students() -> None:
    found = mean_difference([1.0, 2.0, 4.0], [0.0, 0.0, 0.0])
    reach = 4.302653 * math.sqrt(7 / 3) / math.sqrt(3)
    assert found.mean == pytest.approx(7 / 3)
    assert (found.low, found.high) == pytest.approx((7 / 3 - reach, 7 / 3 + reach), abs=1e-5)
    assert mean_difference([1.0], [0.0]).low == -math.inf


def _likeliest(probabilities: list[float], count: int) -> list[tuple[int, float]]:
    ranked = sorted(range(len(probabilities)), key=lambda token: -probabilities[token])
    return [(token, math.log(probabilities[token])) for token in ranked[:count]]


@given(st.integers(0, 10_000), st.integers(1, 12))
def test_divergence_is_a_lower_bound_and_exact_with_all_tokens(seed: int, count: int) -> None:
    rng = random.Random(seed)
    weights = [[rng.random() + 1e-3 for _ in range(12)] for _ in range(2)]
    p, q = ([value / sum(row) for value in row] for row in weights)
    whole = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert divergence(_likeliest(p, 12), _likeliest(q, 12)) == pytest.approx(whole, abs=1e-9)
    assert 0 <= divergence(_likeliest(p, count), _likeliest(q, count)) <= whole + 1e-9


def test_divergence_of_disjoint_lists() -> None:
    """What the other list doesn't name is at most as likely as its last, or as what it leaves."""
    assert divergence([(1, math.log(0.99))], [(2, math.log(0.99))]) > 4
    assert divergence([(1, math.log(0.5)), (2, math.log(0.4))], [(3, math.log(0.6)), (4, math.log(0.1))]) > 1
    assert math.isfinite(divergence([(1, 0.0)], [(1, math.log(1e-9)), (2, 0.0)]))


def test_shared_prefix() -> None:
    assert shared_prefix([1, 2, 3], [1, 2, 4]) == 2
    assert shared_prefix([1, 2], [1, 2, 3]) == 2
    assert shared_prefix([], [1]) == 0
