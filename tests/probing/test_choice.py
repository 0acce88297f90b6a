"""Ranking, the bound, where sets are looked for, and the choice."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from vllm_trimix.probing.choice import MAX_LOSS, candidates, choose, further, grid, prompts_needed, upper_bound
from vllm_trimix.probing.ranking import random_order, rank, rank_correlation


def test_rank_takes_the_deeper_among_equals() -> None:
    assert rank([0.0, 2.0, 0.0, 1.0]) == [2, 0, 3, 1]
    assert rank([0.0, 2.0, 0.0, 1.0], excluded=[0, 3]) == [2, 1]


def test_random_orders_hold_the_same_layers() -> None:
    orders = [random_order([0, 2, 3, 4, 7], seed=0, index=index) for index in range(3)]
    assert all(sorted(order) == [0, 2, 3, 4, 7] for order in orders)
    assert orders == [random_order([7, 4, 3, 2, 0], seed=0, index=index) for index in range(3)]
    assert len({tuple(order) for order in orders}) > 1


def test_rank_correlation_is_spearmans() -> None:
    assert rank_correlation([3, 1, 2, 0], [3, 1, 2, 0]) == 1
    assert rank_correlation([3, 1, 2, 0], [0, 2, 1, 3]) == -1
    # 1 - 6 * (1 + 1) / (4 * 15): two neighbours change places.
    assert rank_correlation([0, 1, 2, 3], [1, 0, 2, 3]) == pytest.approx(0.8)
    assert rank_correlation([0, 1], [1, 0]) is None


def test_the_bound_is_students() -> None:
    """One-sided 95%: mean + 1.860 s / 3 for nine values (any table of Student's t, 8 degrees of freedom)."""
    values = [0.01 * n for n in range(9)]
    spread = math.sqrt(sum((v - 0.04) ** 2 for v in values) / 8)
    assert upper_bound(values) == pytest.approx(0.04 + 1.8595 * spread / 3, rel=1e-4)
    assert upper_bound([0.0, 0.0]) == 0
    assert upper_bound([0.0]) == math.inf


def test_so_many_prompts_would_do() -> None:
    """The same values again and again: at that number the bound is within the limit, well before it isn't."""
    values = [0.0, 0.012, 0.004, 0.02, -0.004, 0.008]
    needed = prompts_needed(values)
    assert needed is not None
    assert needed > len(values)
    more = [value for _, value in zip(range(needed), itertools.cycle(values), strict=False)]
    assert upper_bound(more) <= MAX_LOSS
    assert upper_bound(more[: needed // 3]) > MAX_LOSS
    assert prompts_needed([0.01, 0.03]) is None


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 30, 80])
def test_few_sets_around_the_turn(count: int) -> None:
    steps = grid(count)
    assert steps[-1] == count
    assert len(steps) <= 5
    for last_good in [0, *steps]:
        curve = {k: 0.0 if k <= last_good else 1.0 for k in steps}
        found = candidates(curve)
        assert found == sorted(set(found))
        assert 1 <= len(found) <= 4
        beyond = min([k for k in steps if k > last_good], default=count)
        assert 1 <= found[0] <= max(1, last_good or beyond)
        assert found[-1] <= beyond
        assert last_good == 0 or last_good in found


@pytest.mark.parametrize("count", [1, 2, 3, 5, 12, 30, 80])
def test_where_all_hold_larger_sets_follow(count: int) -> None:
    steps = grid(count)
    for last_good in [0, *steps]:
        curve = {k: 0.0 if k <= last_good else 1.0 for k in steps}
        tried = candidates(curve)
        found = further(tried, curve)
        assert len(found) <= 2
        assert found == sorted(set(found))
        assert all(k > tried[-1] for k in found)
        # They end where the ranking prompts lost too much, or with all layers.
        assert (found or tried)[-1] == min([k for k in steps if k > tried[-1]], default=count)
        assert bool(found) is (tried[-1] < count)


def test_a_dip_in_the_curve_is_no_turn() -> None:
    assert max(candidates({2: 0.0, 4: 0.5, 6: 0.0, 8: 0.0, 10: 0.0})) < 4


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ({1: [0.0, 0.0]}, 1),
        ({4: [0.009, 0.009], 6: [0.011, 0.011]}, 4),
        # The mean is small, but not surely.
        ({1: [0.0, 0.018]}, 0),
        # Behind one that fails nothing is chosen: the best of many would be chosen by chance.
        ({1: [0.5, 0.5], 2: [-0.2, -0.2]}, 0),
    ],
)
def test_choice(losses: dict[int, list[float]], expected: int) -> None:
    assert choose({k: upper_bound(values) for k, values in losses.items()}) == expected


def test_a_set_that_loses_too_much_is_rarely_chosen() -> None:
    """Ten sets, each of which truly loses a little more than allowed: one in twenty choices may be wrong, not one in
    three, as with the best of ten."""
    rng = random.Random(0)
    wrong = 0
    for _ in range(400):
        losses = ([rng.gauss(1.05 * MAX_LOSS, 0.02) for _ in range(16)] for _ in range(10))
        wrong += choose({k: upper_bound(values) for k, values in enumerate(losses, start=1)}) > 0
    assert wrong / 400 < 0.08
