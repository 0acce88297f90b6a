"""A machine whose timings are known, and its clock."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field


def triangle_ratio(crossing: float) -> Callable[[int], float]:
    """Triangle / dense as it runs in practice: falling with the length, 1 at ``crossing``."""
    return lambda length: 0.5 + 0.5 * crossing / length


@dataclass
class Machine:
    """Answers like an engine, and lets its clock run.

    Attributes:
        ratio: Triangle / dense of a prompt length.
        dynamic_ratio: Dynamic / triangle of a prompt length.
        noise: Standard deviation of each timing, relative.
        budget: Seconds until ``left`` is 0.
        asked: Every request: length, seed, variant.
    """

    ratio: Callable[[int], float]
    noise: float = 0.0
    budget: float = float("inf")
    seed: int = 0
    now: float = 0.0
    asked: list[tuple[int, int, str]] = field(default_factory=list)
    dynamic_ratio: Callable[[int], float] = lambda length: 1.0

    def __post_init__(self) -> None:
        self.generator = random.Random(self.seed)

    def dense_seconds(self, length: int) -> float:
        return length / 5000 + (length / 5000) ** 2

    def ask(self, length: int, seed: int, variant: str) -> float:
        self.asked.append((length, seed, variant))
        seconds = self.dense_seconds(length) * (1.0 if variant == "dense" else self.ratio(length))
        seconds *= self.dynamic_ratio(length) if variant == "dynamic" else 1.0
        seconds *= self.generator.lognormvariate(0, self.noise)
        self.now += seconds
        return seconds

    def left(self) -> float:
        return self.budget - self.now
