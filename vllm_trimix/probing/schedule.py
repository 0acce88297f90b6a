"""How long a probe takes, told before it starts, and how many prompts a time allows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

GRADIENT_PASSES = 6.5
"""Forward passes that a scored prompt's gradient costs; 6.3 measured."""
SETS = 4
"""Layer sets that are tried on each held-out prompt of the shortest length; at longer ones those that passed."""
LONGER_SETS = 2
CURVE_SETS = 5
COMPARED = 8
"""Held-out prompts that other orders are compared on."""
LEAST = 8
"""Held-out prompts without which a bound says little."""
_SHARE = 0.75
"""Of a pass, what a layer set costs where what lies below its first layer is known."""


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
    """

    pass_seconds: Mapping[int, float]
    scored: int
    layers: int
    gradient: bool
    ablation: bool
    orders: int
    compared: int
    reuses: bool

    def seconds(self, samples: int) -> float:
        """With so many held-out prompts of each length."""
        share = _SHARE if self.reuses else 1.0
        lengths = sorted(self.pass_seconds)
        shortest = self.pass_seconds[lengths[0]]
        # The control hides something in every layer: a whole pass.
        passes = self.scored * (2 + self.orders * CURVE_SETS * share)
        passes += self.scored * GRADIENT_PASSES if self.gradient else 0
        passes += self.scored * (1 + share * self.layers) if self.ablation else 0
        passes += min(samples, COMPARED) * (1 + self.compared)
        held_out = samples * (1 + self.orders * SETS * share) * shortest
        for length in lengths[1:]:
            held_out += samples * (1 + LONGER_SETS * share) * self.pass_seconds[length]
        return passes * shortest + held_out

    def samples_within(self, seconds: float, *, most: int) -> int:
        """Held-out prompts of each length that the time allows, between ``LEAST`` and ``most``."""
        least = min(LEAST, most)
        return max([count for count in range(least, most + 1) if self.seconds(count) <= seconds], default=least)


def words(seconds: float) -> str:
    """A time as one says it."""
    if seconds < 90:
        return f"{max(2, round(seconds))} seconds"
    if seconds < 5400:
        return f"{round(seconds / 60)} minutes"
    return f"{seconds / 3600:.1f} hours"
