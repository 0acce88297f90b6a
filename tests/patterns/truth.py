"""What each pattern selects by its paper's formulas: fp64, a row, a key and a block at a time.

Nothing here comes from the package: it is the other side of the comparison. Where scores decide, those on either side
of the border must lie so far apart that rounding can't swap them; otherwise the inputs are no test (``Undecided``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

SEPARATION = 1e-5
"""Least relative gap between what is just selected and what just isn't; fp32 errs by less than a tenth of it."""


class Undecided(Exception):
    """The inputs leave open what is selected; take others."""


class Head(NamedTuple):
    """One query head and its keys.

    Attributes:
        q: Queries of every position, [num_positions, head_size]; the pattern may look at its own rows and the last.
        k: Keys so far, [num_keys, head_size].
        position: First sparse row.
        num_rows: Sparse rows.
        num_last: Last rows that the chunk gives to estimates; the last of ``k``.
        scale: Softmax scale.
    """

    q: np.ndarray
    k: np.ndarray
    position: int
    num_rows: int
    num_last: int
    scale: float

    @property
    def num_keys(self) -> int:
        return len(self.k)

    @property
    def rows(self) -> range:
        return range(self.position, self.position + self.num_rows)

    def tiles(self, block_size: int) -> range:
        return range(self.rows[0] // block_size, self.rows[-1] // block_size + 1)


def softmax(scores: Iterable[float]) -> list[float]:
    """Softmax of one row."""
    scores = list(scores)
    top = max(scores)
    powers = [math.exp(score - top) for score in scores]
    total = math.fsum(powers)
    return [power / total for power in powers]


def mask(head: Head, block_size: int, blocks: Iterable[tuple[int, int]], singles: Iterable[int] = ()) -> np.ndarray:
    """[num_rows, num_keys]: each row's keys in the (tile, block) pairs of its tile, and single ones, up to its own."""
    seen = np.zeros((head.num_rows, head.num_keys), dtype=bool)
    for i in head.rows:
        for tile, block in blocks:
            if tile == i // block_size:
                seen[i - head.position, block * block_size : min((block + 1) * block_size, i + 1)] = True
        for j in singles:
            if j <= i:
                seen[i - head.position, j] = True
    return seen


def largest(values: Sequence[float] | np.ndarray, count: int, forced: int) -> set[int]:
    """Places of the ``count`` largest values; the first ``forced`` places come first, in order."""
    order = sorted(range(len(values)), key=lambda place: -math.inf if place < forced else -values[place])
    if forced < count < len(values):
        kept, dropped = values[order[count - 1]], values[order[count]]
        if kept - dropped <= SEPARATION * abs(kept):
            raise Undecided
    return set(order[:count])


def fewest(shares: dict, goal: float) -> set:
    """The smallest set of the largest shares that sums up to ``goal``: one fewer would fall below it."""
    kept: set = set()
    held, last = 0.0, math.inf
    if goal == 0:
        return kept
    for item, share in sorted(shares.items(), key=lambda pair: -pair[1]):
        if abs(held - goal) <= SEPARATION:
            raise Undecided
        if held >= goal:
            if last - share <= SEPARATION * last:
                raise Undecided
            break
        kept.add(item)
        held, last = held + share, share
    return kept


def bounded(shares: dict[int, float], goal: float, least: int, most: float) -> set[int]:
    """The fewest that hold ``goal``, but at least and at most so many; places count from 0."""
    kept = fewest(shares, goal)
    count = int(min(max(len(kept), least), most, len(shares)))
    return kept if count == len(kept) else largest([shares[place] for place in range(len(shares))], count, 0)


def sums_of_last_rows(head: Head, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Attention of the last ``count`` rows summed by key j, and by distance i - j."""
    columns, slashes = np.zeros(head.num_keys), np.zeros(head.num_keys)
    for i in range(head.num_keys - min(count, head.num_last), head.num_keys):
        powers = np.exp(head.k[: i + 1] @ head.q[i] * head.scale)
        probs = powers / powers.sum()
        for j in range(i + 1):
            columns[j] += probs[j]
            slashes[i - j] += probs[j]
    return columns, slashes


def crossed(head: Head, slashes: set[int], block_size: int) -> set[tuple[int, int]]:
    """(tile, block) pairs that hold a pair (i, j) of a selected distance; all rows of the tile count."""
    found = set()
    for tile in head.tiles(block_size):
        for block in range(tile + 1):
            rows = range(tile * block_size, (tile + 1) * block_size)
            keys = range(block * block_size, (block + 1) * block_size)
            if any(i - j in slashes for i in rows for j in keys):
                found.add((tile, block))
    return found


def dense(head: Head) -> np.ndarray:
    """Every key up to the row's own."""
    return a_shape(head, 0, head.num_keys)


def a_shape(head: Head, n_init: int, n_local: int) -> np.ndarray:
    """Sinks, and a window that counts the row itself."""
    seen = np.zeros((head.num_rows, head.num_keys), dtype=bool)
    for i in head.rows:
        for j in range(i + 1):
            seen[i - head.position, j] = j < n_init or i - j < n_local
    return seen


def vertical_slash(head: Head, vertical_size: int, slash_size: int, block_size: int) -> np.ndarray:
    """MInference: the largest column and diagonal sums of the last 64 rows; the first 30 and the nearest 100 first."""
    columns, slashes = sums_of_last_rows(head, 64)
    verticals = largest(columns, vertical_size, 30)
    blocks = crossed(head, largest(slashes, slash_size, 100), block_size)
    return mask(head, block_size, blocks, verticals)


def mean(rows: np.ndarray) -> np.ndarray:
    """Mean of some rows, one added after the other."""
    total = np.zeros(rows.shape[1])
    for row in rows:
        total = total + row
    return total / len(rows)


def block_of_keys(head: Head, block: int, block_size: int) -> np.ndarray:
    return head.k[block * block_size : (block + 1) * block_size]


def tile_mean(head: Head, tile: int, block_size: int) -> np.ndarray:
    """Mean of the tile's rows that the chunk has."""
    return mean(np.stack([head.q[i] for i in head.rows if i // block_size == tile]))


def block_sparse(head: Head, top_k: int, block_size: int) -> np.ndarray:
    """MInference: the blocks of the largest products of means; the first and the tile's own are among the ``top_k``."""
    blocks = set()
    for tile in head.tiles(block_size):
        q = tile_mean(head, tile, block_size)
        scores = [float(q @ mean(block_of_keys(head, block, block_size))) for block in range(tile)]
        # The tile's own goes to the front, so that the forced ones are the first two.
        order = [tile, *range(tile)]
        chosen = largest([math.inf, *scores], top_k, len({0, tile}))
        blocks |= {(tile, order[place]) for place in chosen}
    return mask(head, block_size, blocks)


def js_distance(head: Head, block_size: int) -> float:
    """FlexPrefill, algorithm 2: root of the Jensen-Shannon divergence of pooled and true attention by blocks."""
    last = min(128, head.num_last)
    num_blocks = -(-head.num_keys // block_size)
    q = mean(head.q[head.num_keys - last : head.num_keys])
    pooled = softmax(
        float(q @ mean(block_of_keys(head, block, block_size))) * head.scale for block in range(num_blocks)
    )
    columns, _ = sums_of_last_rows(head, 128)
    true = [math.fsum(columns[block * block_size : (block + 1) * block_size]) / last for block in range(num_blocks)]

    def divergence(p: list[float], q: list[float]) -> float:
        return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0)

    middle = [(a + b) / 2 for a, b in zip(pooled, true, strict=True)]
    return math.sqrt((divergence(pooled, middle) + divergence(true, middle)) / 2)


def flexprefill(
    head: Head,
    gamma: float,
    tau: float,
    block_size: int,
    *,
    min_budget: int = 0,
    max_budget: int | None = None,
    max_columns: int = 1024,
    dense_keys: int = 256,
) -> np.ndarray:
    """FlexPrefill, algorithm 1: algorithm 4 where the distance is below ``tau``, else algorithm 3.

    The budgets are those of its code: at least and at most so many columns, and diagonals; with algorithm 4 the least.
    """
    if head.num_keys <= dense_keys:
        return dense(head)
    distance = js_distance(head, block_size)
    if abs(distance - tau) <= SEPARATION:
        raise Undecided
    blocks = {(tile, block) for tile in head.tiles(block_size) for block in (0, tile)}
    goal, most = gamma, math.inf if max_budget is None else max_budget
    if distance < tau:
        blocks |= query_aware(head, gamma, block_size)
        goal, most = 0.0, min_budget
    columns, slashes = sums_of_last_rows(head, 128)
    total = math.fsum(columns)
    singles = bounded({j: value / total for j, value in enumerate(columns)}, goal, min_budget, most)
    diagonals = bounded({d: value / total for d, value in enumerate(slashes)}, goal, min_budget, most)
    blocks |= crossed(head, diagonals, block_size)
    if len(singles) > max_columns:
        blocks |= {(tile, j // block_size) for tile in head.tiles(block_size) for j in singles}
        singles = set()
    return mask(head, block_size, blocks, singles)


def query_aware(head: Head, gamma: float, block_size: int) -> set[tuple[int, int]]:
    """Algorithm 4: of the chunk's (tile, block) pairs the fewest that hold ``gamma``; every tile weighs the same."""
    tiles = head.tiles(block_size)
    shares: dict[tuple[int, int], float] = {}
    for tile in tiles:
        q = tile_mean(head, tile, block_size)
        blocks = range(tile + 1)
        probs = softmax(float(q @ mean(block_of_keys(head, block, block_size))) * head.scale for block in blocks)
        shares |= {(tile, block): prob / len(tiles) for block, prob in enumerate(probs)}
    return fewest(shares, gamma)


def xattention(head: Head, threshold: float, stride: int, block_size: int) -> np.ndarray:
    """XAttention, algorithm 1: antidiagonals of stride x stride squares, softmax, and the fewest blocks for a tile."""
    blocks = set()
    for tile in head.tiles(block_size):
        shares = dict.fromkeys(range(tile + 1), 0.0)
        for first in range(tile * block_size, (tile + 1) * block_size, stride):
            if not any(i in head.rows for i in range(first, first + stride)):
                continue
            # Squares up to the one on the diagonal; rows and keys that the chunk has none of add nothing.
            sums = []
            for left in range(0, first + 1, stride):
                pairs = ((first + stride - 1 - step, left + step) for step in range(stride))
                sums.append(sum(float(head.q[i] @ head.k[j]) for i, j in pairs if i in head.rows and j < head.num_keys))
            for square, prob in enumerate(softmax(value * head.scale / stride for value in sums)):
                shares[square * stride // block_size] += prob
        total = math.fsum(shares.values())
        chosen = fewest({block: share / total for block, share in shares.items()}, threshold)
        blocks |= {(tile, block) for block in {0, tile} | chosen}
    return mask(head, block_size, blocks)
