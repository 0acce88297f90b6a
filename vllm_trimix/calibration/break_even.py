"""The break-even prompt lengths: which lengths to measure, what the timings prove, and the overlay that records it.

Nothing here runs an engine: ``measure`` is handed a function that does. Two variants are compared at a time: the
triangle with dense prefill, and a dynamic pattern in the shallow layers with the triangle alone. A *pair* is one prompt
asked under both, one right after the other; a *row* is all pairs of one length.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_trimix.measurement.intervals import interval_confidence, median_interval

DENSE, TRIANGLE, DYNAMIC = "dense", "triangle", "dynamic"
# How a request asks for each variant: its extra_args.
VARIANTS: dict[str, dict[str, str]] = {
    DENSE: {"trimix": "off"},
    TRIANGLE: {"trimix": "triangle"},
    DYNAMIC: {"trimix": "on"},
}

SHORTEST = 512
LONGEST = 32768
MIN_REPEATS = 3
# The fewest pairs whose 95% interval survives one disturbed pair.
DEFAULT_REPEATS = 9
# "Never slower" leaves no room: the whole interval must lie at or below 1.
LIMIT = 1.0
# Repeats of one prompt length on an idle machine stay within a few percent.
LARGE_SPREAD = 0.1

Ask = Callable[[int, int, str], float]
"""Seconds to the first token, given prompt length, seed of the prompt and variant. TimeoutError: no time left."""


class Comparison(NamedTuple):
    """Two variants.

    Attributes:
        baseline: The one that long prompts should make the slower.
        candidate: The other.
        same_up_to: Longest prompt, in tokens, of which both run the same code.
    """

    baseline: str
    candidate: str
    same_up_to: int


@dataclass(frozen=True)
class Row:
    """The timings of one prompt length.

    Attributes:
        length: Prompt tokens.
        baseline: Seconds to the first token, one a pair.
        candidate: The same for the other variant, in the order of ``baseline``.
        is_control: The pattern hides nothing at this length: both variants ran the same code.
        names: Of the two variants.
        density: Share of the keys that a dynamic pattern read; None for none.
    """

    length: int
    baseline: tuple[float, ...]
    candidate: tuple[float, ...]
    is_control: bool = False
    names: tuple[str, str] = (DENSE, TRIANGLE)
    density: float | None = None

    @property
    def ratios(self) -> list[float]:
        """Candidate / baseline, pair by pair: what slows both alike cancels."""
        return [candidate / baseline for candidate, baseline in zip(self.candidate, self.baseline, strict=True)]

    @property
    def ratio(self) -> float:
        """Median of the ratios."""
        return statistics.median(self.ratios)

    @property
    def interval(self) -> tuple[float, float]:
        """Of the ratio, with ``confidence``."""
        return median_interval(self.ratios)

    @property
    def confidence(self) -> float:
        """Probability that the interval holds the true ratio."""
        return interval_confidence(len(self.baseline))

    @property
    def is_win(self) -> bool:
        """Whether the candidate is proven not slower."""
        return not self.is_control and self.interval[1] <= LIMIT

    @property
    def verdict(self) -> str:
        """What the interval says."""
        if self.is_control:
            return "same code"
        if self.is_win:
            return "faster"
        return "slower" if self.interval[0] > LIMIT else "undecided"

    @property
    def spread(self) -> float:
        """Middle half of the baseline's timings, relative to their median: how quiet the machine was."""
        low, _, high = statistics.quantiles(self.baseline, n=4, method="inclusive")
        return (high - low) / statistics.median(self.baseline)

    def as_json(self) -> dict[str, Any]:
        """For the overlay's provenance."""
        low, high = self.interval
        return {
            "length": self.length,
            f"{self.names[0]}_s": [round(value, 6) for value in self.baseline],
            f"{self.names[1]}_s": [round(value, 6) for value in self.candidate],
            "ratio": round(self.ratio, 4),
            "interval": [round(low, 4), round(high, 4)],
            "confidence": round(self.confidence, 4),
            "verdict": self.verdict,
            **({} if self.density is None else {"density": round(self.density, 4)}),
        }


def break_even(rows: Sequence[Row]) -> int | None:
    """The smallest measured length from which on every measured length is a win; None if the longest is none."""
    found = None
    for row in sorted(rows, key=lambda row: row.length, reverse=True):
        if not row.is_win:
            break
        found = row.length
    return found


def sweep_lengths(longest: int) -> list[int]:
    """Doubling lengths from ``SHORTEST`` to ``longest``, which is always the last.

    Raises:
        ValueError: ``longest`` is shorter than the shortest.
    """
    if longest < SHORTEST:
        raise ValueError(f"--max-length: {longest} is below {SHORTEST} tokens, the shortest length that is measured")
    doublings = int(math.log2(longest / SHORTEST))
    lengths = [SHORTEST << index for index in range(doublings + 1)]
    return lengths if lengths[-1] == longest else [*lengths, longest]


def next_length(rows: Sequence[Row]) -> int | None:
    """A length between the last that is no win and the break-even, or None once they are close.

    Close is 512 tokens, or a quarter of the shorter: a finer threshold moves few requests.
    """
    found = break_even(rows)
    below = max((row.length for row in rows if found is not None and row.length < found), default=None)
    if found is None or below is None or found - below <= max(512, below // 4):
        return None
    return (below + found) // 2 // 128 * 128


def measure(
    ask: Ask,
    comparison: Comparison,
    *,
    longest: int,
    repeats: int,
    left: Callable[[], float],
    on_row: Callable[[Row], None],
    say: Callable[[str], None],
) -> list[Row]:
    """Measures doubling lengths, then refines between the last loss and the first win.

    Lengths that are foreseen not to fit the time left are dropped, longest first, with a line that says so.

    Args:
        ask: Runs one request.
        comparison: Of which variants.
        longest: Longest prompt to measure, in tokens.
        repeats: Pairs per length.
        left: Seconds left of the budget.
        on_row: Told of each row.
        say: Told what is dropped and what is refined.

    Returns:
        The rows, by length.

    Raises:
        ValueError: ``longest`` is too short.
    """
    rows: list[Row] = []

    def try_length(length: int) -> bool:
        if foreseen_seconds(rows, length, repeats) > left():
            return False
        try:
            row = measure_length(ask, comparison, length, repeats=repeats, left=left)
        except TimeoutError:
            return False
        rows.append(row)
        on_row(row)
        return True

    lengths = sweep_lengths(longest)
    for index, length in enumerate(lengths):
        if not try_length(length):
            dropped = ", ".join(str(length) for length in lengths[index:])
            say(f"out of --budget: not measured: {dropped} tokens")
            break
    while (between := next_length(rows)) is not None:
        say(f"refining: {between} tokens")
        if not try_length(between):
            say("out of --budget: the break-even is not refined further")
            break
    return sorted(rows, key=lambda row: row.length)


def foreseen_seconds(rows: Sequence[Row], length: int, repeats: int) -> float:
    """At most how long a length takes, warm-up included: dense attention grows with the square of the length."""
    if not rows:
        return 0.0
    # From the shortest measured length above, or else the longest.
    row = min(rows, key=lambda row: (row.length < length, abs(row.length - length)))
    pair = statistics.median(row.baseline) + statistics.median(row.candidate)
    return pair * max(1.0, length / row.length) ** 2 * (repeats + 1)


def measure_length(ask: Ask, comparison: Comparison, length: int, *, repeats: int, left: Callable[[], float]) -> Row:
    """Measures one length: a warm-up, then pairs in the order A B, B A, A B ..., each with a prompt of its own.

    Raises:
        TimeoutError: The budget ended first.
    """
    names = (comparison.baseline, comparison.candidate)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for pair in range(repeats + 1):
        warm_up = pair == 0
        for name in names if pair % 2 else names[::-1]:
            # One prompt a pair, another one in every pair and length; the warm-up pays for what is made once a length.
            if left() <= 0:
                raise TimeoutError
            taken = ask(length, length * 1000 + pair, name)
            if not warm_up:
                seconds[name].append(taken)
    baseline, candidate = (tuple(seconds[name]) for name in names)
    return Row(length, baseline, candidate, length <= comparison.same_up_to, names)
