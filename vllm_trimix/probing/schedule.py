"""How long a probe takes, told before it starts, and how many prompts a time allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GRADIENT_PASSES = 6.5
"""Forward passes that a scored prompt's gradient costs; 6.3 measured."""
SETS = 6
"""Layer sets that are tried on each held-out prompt of the shortest length, at most; at longer ones few that passed."""
LONGER_SETS = 2
CURVE_SETS = 5
COMPARED = 6
"""Held-out prompts that other orders are compared on."""
LEAST = 8
"""Held-out prompts without which a bound says little."""
_SHARE = 0.75
"""Of a pass, what a layer set costs where what lies below its first layer is known; before the sets are."""


@dataclass(frozen=True)
class Work:
    """What a probe will do.

    Attributes:
        pass_seconds: Length -> seconds of one dense pass.
        scored: Prompts that rank, of the shortest length.
        layers: That can be triangle layers.
        gradient, ablation: Which rankings are made.
        orders: Rankings whose sets are tried.
        compared: Other orders.
        reuses: Whether passes of one prompt share layers.
        share: Of a pass, what a layer set costs then.
    """

    pass_seconds: Mapping[int, float]
    scored: int
    layers: int
    gradient: bool
    ablation: bool
    orders: int
    compared: int
    reuses: bool
    share: float = _SHARE

    def ranking_seconds(self) -> float:
        """What ranks, with the control and the few sets that show where losses begin to grow."""
        # The control hides something in every layer: a whole pass.
        passes = self.scored * (2 + self.orders * CURVE_SETS * _SHARE)
        passes += self.scored * GRADIENT_PASSES if self.gradient else 0
        passes += self.scored * (1 + _SHARE * self.layers) if self.ablation else 0
        return passes * self.pass_seconds[min(self.pass_seconds)]

    def choosing_seconds(self, samples: int) -> float:
        """What chooses, with so many held-out prompts of each length."""
        share = self.share if self.reuses else 1.0
        shortest, *longer = (self.pass_seconds[length] for length in sorted(self.pass_seconds))
        sets = min(samples, COMPARED) * (1 + self.compared) + samples * (2 + self.orders * SETS * share)
        return sets * shortest + sum(samples * (1 + LONGER_SETS * share) * seconds for seconds in longer)

    def samples_within(self, seconds: float, *, most: int) -> int:
        """Held-out prompts of each length that the time allows, between ``LEAST`` and ``most``."""
        least = min(LEAST, most)
        counts = range(least, most + 1)
        return max([count for count in counts if self.choosing_seconds(count) <= seconds], default=least)


def expected(work: Work, budget: float | None, *, most: int) -> str:
    """How long it will take, in words.

    Args:
        work: What there is to do.
        budget: Seconds that it may take, as far as fewer prompts help; None for no limit.
        most: Held-out prompts of each length.
    """
    ranks = work.ranking_seconds()
    samples = most if budget is None else work.samples_within(budget - ranks, most=most)
    seconds = ranks + work.choosing_seconds(samples)
    return f"about {words(seconds)}, {samples} held-out prompts of each length or more"


def refuse(work: Work, limit: float, *, most: int) -> None:
    """Refuses what takes longer than the user allows.

    Args:
        work: What there is to do.
        limit: Seconds.
        most: Held-out prompts of each length.

    Raises:
        ValueError: Even the fewest take longer.
    """
    count = min(LEAST, most)
    seconds = work.ranking_seconds() + work.choosing_seconds(count)
    if seconds > limit:
        raise ValueError(
            f"--time-budget: {limit / 60:g} minutes: even {count} held-out prompts of each length take about "
            f"{words(seconds)}; allow as much, or take shorter --lengths"
        )


def words(seconds: float) -> str:
    """A time as one says it."""
    if seconds < 90:
        return f"{max(2, round(seconds))} seconds"
    if seconds < 5400:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"
