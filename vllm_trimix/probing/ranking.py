"""Orders in which layers become triangle layers, and how far two of them agree."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence


def rank(importance: Sequence[float], *, excluded: Iterable[int] = ()) -> list[int]:
    """Layers from the least important to the most; among equals the deeper first. Excluded ones don't appear."""
    layers = [layer for layer in range(len(importance)) if layer not in set(excluded)]
    return sorted(layers, key=lambda layer: (importance[layer], -layer))


def random_order(layers: Iterable[int], *, seed: int, index: int) -> list[int]:
    """A random order of these layers, to compare with."""
    shuffled = sorted(layers)
    random.Random(f"{seed} {index}").shuffle(shuffled)
    return shuffled


def rank_correlation(left: Sequence[int], right: Sequence[int]) -> float | None:
    """Spearman's, of two orders of the same layers: 1 the same, -1 reversed; None for fewer than three layers."""
    if len(left) < 3:
        return None
    places = {layer: place for place, layer in enumerate(right)}
    squares = sum((place - places[layer]) ** 2 for place, layer in enumerate(left))
    return 1 - 6 * squares / (len(left) * (len(left) ** 2 - 1))
