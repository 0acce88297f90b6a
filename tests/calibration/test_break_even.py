"""Which length is the break-even: on machines whose true break-even is known."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.calibration.machine import Machine, triangle_ratio
from vllm_trimix.calibration.break_even import (
    DEFAULT_REPEATS,
    DENSE,
    DYNAMIC,
    SHORTEST,
    TRIANGLE,
    Comparison,
    Row,
    break_even,
    foreseen_seconds,
    measure,
    next_length,
    sweep_lengths,
)

DENSE_LEN = 648
ratios = st.floats(min_value=0.2, max_value=5.0)


def row(length: int, *pair_ratios: float, is_control: bool = False) -> Row:
    return Row(length, (1.0,) * len(pair_ratios), pair_ratios, is_control)


def run(machine: Machine, *, longest: int = 32768, dense_len: int = DENSE_LEN, repeats: int = 9) -> Any:
    said: list[str] = []
    rows = measure(
        machine.ask,
        Comparison(DENSE, TRIANGLE, dense_len),
        longest=longest,
        repeats=repeats,
        left=machine.left,
        on_row=lambda row: None,
        say=said.append,
    )
    return rows, said


@given(st.lists(st.booleans(), min_size=1, max_size=8), st.randoms())
def test_break_even_is_the_start_of_the_last_run_of_wins(wins: list[bool], order: random.Random) -> None:
    values = {True: [0.9 + index / 100 for index in range(9)], False: [0.5 + index / 10 for index in range(9)]}
    rows = [row(1000 * (index + 1), *values[win]) for index, win in enumerate(wins)]
    assert [item.is_win for item in rows] == wins
    shuffled = rows[:]
    order.shuffle(shuffled)
    found = break_even(shuffled)
    assert found == break_even(rows)
    if found is None:
        assert not rows[-1].is_win
    else:
        assert all(item.is_win for item in rows if item.length >= found)
        assert all(item.interval[1] <= 1 for item in rows if item.length >= found)
        assert not any(item.is_win for item in rows if item.length == found - 1000)


def test_all_losing_and_all_winning() -> None:
    rows, _ = run(Machine(lambda length: 1.05, noise=0.01), longest=4096)
    assert break_even(rows) is None
    assert [item.verdict for item in rows] == ["same code", "slower", "slower", "slower"]
    rows, _ = run(Machine(lambda length: 0.7, noise=0.01), longest=4096)
    assert break_even(rows) == 1024
    assert [item.verdict for item in rows] == ["same code", "faster", "faster", "faster"]
    rows, _ = run(Machine(lambda length: 0.7, noise=0.01), longest=4096, dense_len=28)
    assert break_even(rows) == SHORTEST


def test_equal_is_not_never_slower() -> None:
    rows, _ = run(Machine(lambda length: 1.0, noise=0.02), longest=8192)
    assert break_even(rows) is None
    assert {item.verdict for item in rows} == {"same code", "undecided"}


def test_lengths_at_which_nothing_is_hidden_never_count() -> None:
    rows, _ = run(Machine(lambda length: 0.5), longest=4096, dense_len=2048)
    assert break_even(rows) is not None
    assert break_even(rows) > 2048
    assert [item.is_control for item in rows] == [item.length <= 2048 for item in rows]


@given(st.floats(min_value=100, max_value=60000), st.integers(3, 12))
@settings(max_examples=60)
def test_a_quiet_machine_finds_the_crossing(crossing: float, repeats: int) -> None:
    rows, _ = run(Machine(triangle_ratio(crossing)), repeats=repeats)
    found = break_even(rows)
    if crossing > 32768:
        assert found is None
    elif crossing <= 1024:
        assert found == 1024
    else:
        assert found is not None
        below = max(item.length for item in rows if item.length < found)
        assert below < crossing <= found
        assert found - below <= max(512, below // 4)
        assert next_length(rows) is None


def test_a_noisy_machine_is_rarely_too_eager() -> None:
    """An eager answer costs users time; the interval allows it in a small part of the runs only."""
    crossing, runs = 3000, 150
    found = []
    for seed in range(runs):
        rows, _ = run(Machine(triangle_ratio(crossing), noise=0.05, seed=seed), longest=16384)
        found.append(break_even(rows))
    eager = sum(length is not None and length < crossing for length in found)
    assert eager <= 0.05 * runs
    assert sum(length is not None and length <= 2 * crossing for length in found) >= 0.8 * runs


@given(st.integers(0, DEFAULT_REPEATS - 1), st.floats(min_value=1.01, max_value=100))
def test_one_disturbed_pair_changes_nothing(place: int, ratio: float) -> None:
    values = [0.9 + index / 1000 for index in range(DEFAULT_REPEATS)]
    assert row(4096, *values).is_win
    values[place] = ratio
    assert row(4096, *values).is_win
    values[(place + 1) % DEFAULT_REPEATS] = ratio
    assert not row(4096, *values).is_win


@given(st.integers(SHORTEST, 1 << 20))
def test_lengths_double_up_to_the_longest(longest: int) -> None:
    lengths = sweep_lengths(longest)
    assert lengths[0] == SHORTEST
    assert lengths[-1] == longest
    assert all(a < b <= 2 * a for a, b in itertools.pairwise(lengths))


def test_too_short() -> None:
    with pytest.raises(ValueError, match="--max-length: 511 is below 512 tokens"):
        sweep_lengths(511)


def test_pairs_share_a_prompt_and_alternate() -> None:
    machine = Machine(lambda length: 0.9)
    rows, _ = run(machine, longest=1024, repeats=5)
    assert [len(item.baseline) for item in rows] == [len(item.candidate) for item in rows] == [5, 5]
    pairs = [machine.asked[at : at + 2] for at in range(0, len(machine.asked), 2)]
    # One of them is the warm-up.
    assert len(pairs) == 2 * 6
    for first, second in pairs:
        assert first[:2] == second[:2]
        assert {first[2], second[2]} == {"dense", "triangle"}
    assert len({pair[0][:2] for pair in pairs}) == len(pairs)
    for length in (512, 1024):
        order = [pair[0][2] for pair in pairs if pair[0][0] == length]
        assert order == ["triangle", "dense"] * 3


@given(st.floats(min_value=0.5, max_value=5000), st.floats(min_value=500, max_value=20000))
@settings(max_examples=60)
def test_the_budget_holds_and_drops_the_longest(budget: float, crossing: float) -> None:
    machine = Machine(triangle_ratio(crossing), budget=budget)
    rows, said = run(machine)
    # One request may be under way when it ends.
    last = machine.asked[-1][0]
    assert machine.now <= budget + machine.dense_seconds(last) * max(1, machine.ratio(last)) * 1.001
    swept = [length for length in sweep_lengths(32768) if any(item.length == length for item in rows)]
    dropped = sweep_lengths(32768)[len(swept) :]
    assert swept == sweep_lengths(32768)[: len(swept)]
    lines = [line for line in said if "not measured" in line]
    assert lines == ([f"out of --budget: not measured: {', '.join(map(str, dropped))} tokens"] if dropped else [])


def test_an_engine_that_does_not_answer_in_time_ends_the_measurement() -> None:
    def ask(length: int, seed: int, variant: str) -> float:
        if length > 1024:
            raise TimeoutError
        return 1.0 if variant == "dense" else 0.5

    machine = Machine(lambda length: 0.5)
    machine.ask = ask  # type: ignore[method-assign]
    rows, said = run(machine, longest=4096)
    assert [item.length for item in rows] == [512, 1024]
    assert said == ["out of --budget: not measured: 2048, 4096 tokens"]


def test_foreseen_seconds_are_no_less_than_what_it_takes() -> None:
    machine = Machine(triangle_ratio(1000))
    rows, _ = run(machine, longest=4096, repeats=3)
    for length in (1500, 3000, 4096, 8192, 30000):
        pair = machine.dense_seconds(length) * (1 + machine.ratio(length))
        assert foreseen_seconds(rows, length, 3) >= 4 * pair * 0.999
    assert foreseen_seconds([], 8192, 3) == 0


def test_a_dynamic_pattern_is_compared_with_the_triangle_alone() -> None:
    def ask(length: int, seed: int, variant: str) -> float:
        asked.add(variant)
        return length / 1000 * {TRIANGLE: 1.0, DYNAMIC: triangle_ratio(3000)(length)}[variant]

    asked: set[str] = set()
    rows = measure(
        ask,
        Comparison(TRIANGLE, DYNAMIC, 700),
        longest=8192,
        repeats=9,
        left=lambda: 1e9,
        on_row=lambda row: None,
        say=lambda line: None,
    )
    assert asked == {TRIANGLE, DYNAMIC}
    assert [item.is_control for item in rows] == [item.length <= 700 for item in rows]
    assert break_even(rows) == 3072
    assert {"length", "triangle_s", "dynamic_s", "ratio"} <= rows[0].as_json().keys()
