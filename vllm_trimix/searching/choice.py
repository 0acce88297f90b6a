"""Which candidate each head gets, of what they cost and lose."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from vllm_trimix.patterns.base import DynamicPattern

_SAME_COST = 1e-9

Rows = Sequence[Sequence[float]]


@dataclass(frozen=True)
class Budget:
    """How many keys may be read, of dense attention's.

    Attributes:
        share: The fraction.
        of: ``head``: each head may read as much. ``layer``: a layer's heads share it.
    """

    share: float
    of: str

    def choose(self, losses: Rows, densities: Rows, tolerance: float) -> list[int]:
        """A candidate for each head of a layer."""
        if self.of == "head":
            return per_head(losses, densities, share=self.share, tolerance=tolerance)
        return per_layer(losses, densities, share=self.share, tolerance=tolerance)


def per_head(losses: Rows, densities: Rows, *, share: float, tolerance: float) -> list[int]:
    """For each head the cheapest of the best candidates within its budget; the cheapest where none is.

    Args:
        losses: [head][candidate].
        densities: Likewise.
        share: Of dense attention's keys.
        tolerance: Losses closer than this are equal.
    """
    found = []
    for loss, density in zip(losses, densities, strict=True):
        within = [index for index, cost in enumerate(density) if cost <= share]
        if within:
            best = min(loss[index] for index in within)
            within = [index for index in within if loss[index] <= best + tolerance]
        found.append(_cheapest(within or list(range(len(loss))), loss, density, tolerance))
    return found


def _cheapest(numbers: Sequence[int], loss: Sequence[float], density: Sequence[float], tolerance: float) -> int:
    """Of candidates that cost the same, the first that is as good as any: simple ones stand first."""
    least = min(density[index] for index in numbers)
    equal = [index for index in numbers if density[index] <= least + _SAME_COST]
    best = min(loss[index] for index in equal)
    return next(index for index in equal if loss[index] <= best + tolerance)


def per_layer(losses: Rows, densities: Rows, *, share: float, tolerance: float) -> list[int]:
    """Begins with each head's cheapest candidate, and spends what is left where a key gains most.

    Args:
        losses: [head][candidate].
        densities: Likewise.
        share: Of dense attention's keys of all heads.
        tolerance: A change that gains less isn't worth its keys.
    """
    chosen = per_head(losses, densities, share=0.0, tolerance=tolerance)
    while True:
        left = share * len(losses) - sum(density[index] for density, index in zip(densities, chosen, strict=True))
        steps = []
        for head, (loss, density, now) in enumerate(zip(losses, densities, chosen, strict=True)):
            for index in range(len(loss)):
                gain, cost = loss[now] - loss[index], density[index] - density[now]
                if gain > tolerance and cost <= left:
                    steps.append((gain / cost if cost > 0 else math.inf, gain, -head, -index))
        if not steps:
            return chosen
        _, _, head, index = max(steps)
        chosen[-head] = -index


def by_block_size(
    candidates: Sequence[DynamicPattern],
    losses: Rows,
    densities: Rows,
    *,
    choose: Callable[[Rows, Rows, float], list[int]],
    tolerance: float,
) -> list[int]:
    """A layer's choice: its heads need one block size, so that each size chooses alone and the best one wins.

    Args:
        candidates: Patterns.
        losses: [head][candidate].
        densities: Likewise.
        choose: Losses, densities and tolerance to a candidate for each head.
        tolerance: Of one head; sums of losses closer than all heads' are equal, and the cheaper one wins.
    """
    found = []
    for size in sorted({pattern.block_size for pattern in candidates}):
        numbers = [index for index, pattern in enumerate(candidates) if pattern.block_size == size]
        part_losses, part_densities = (
            [[row[index] for index in numbers] for row in rows] for rows in (losses, densities)
        )
        chosen = [numbers[index] for index in choose(part_losses, part_densities, tolerance)]
        loss, density = (
            sum(row[index] for row, index in zip(rows, chosen, strict=True)) for rows in (losses, densities)
        )
        found.append((loss, density, chosen))
    best = min(loss for loss, _, _ in found)
    equal = [entry for entry in found if entry[0] <= best + tolerance * len(losses)]
    return min(equal, key=lambda entry: (entry[1], entry[0]))[2]
