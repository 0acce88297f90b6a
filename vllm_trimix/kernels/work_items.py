"""The kernel's work, cut on the host once a step: tiles of triangle rows, and of dense rows with their keys split.

No tensors and no Triton: plain integers in NumPy, so that a step's work is one small upload.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from vllm_trimix.plan import Span

DENSE = -1
"""Column ``num_sinks`` of a dense item: its rows see every key up to their own."""
WHOLE = -1
"""Column ``slot`` of an item that sees all keys of its rows: it writes the output itself."""
IDLE = (0, 0, 0, 0, 0, 0, 0, WHOLE)
"""An item without rows."""

# A part of the keys shorter than this costs more in partial results than it gains.
_MIN_SPLIT_KEYS = 512
# Parts start at multiples of this: of every kernel's step.
_SPLIT_ALIGNMENT = 128


class Work(NamedTuple):
    """One launch.

    Attributes:
        items: [num_items, 8] int32: request, first_row, num_rows, position, first_key, end_key, num_sinks, slot. The
            rows see the keys before ``num_sinks`` and those of their rule in [first_key, end_key). Longest first.
        merges: [num_merges, 4] int32: first_row, num_rows, first_slot, num_slots; tiles whose keys were split.
        num_slots: Partial results that the launch writes, for each KV head.
    """

    items: np.ndarray
    merges: np.ndarray
    num_slots: int


def max_slots(num_kv_heads: int, target_programs: int) -> int:
    """Partial results a KV head that ``cut_work`` never exceeds: what a workspace must hold."""
    return target_programs // num_kv_heads


def cut_work(
    band: Sequence[Span],
    tails: Sequence[Span],
    *,
    tile_rows: int,
    n_init: int,
    n_local: int,
    num_kv_heads: int,
    target_programs: int,
) -> Work:
    """Cuts a step's rows into work items.

    Dense tiles are few and long. Their keys are split until the launch has about ``target_programs`` programs for them,
    in shares by length; they come first, so that the short triangle tiles fill what is left of the device.

    Args:
        band: Rows that see the sinks and the window.
        tails: Dense rows.
        tile_rows: Query rows of a full tile.
        n_init: Sink keys.
        n_local: Window in tokens, counting the query itself.
        num_kv_heads: Programs of an item.
        target_programs: Programs that fill the device; bounds ``num_slots * num_kv_heads``.
    """
    tiles = _cut_tiles(tails, tile_rows)
    lengths = (tiles[:, 2] + tiles[:, 3]).astype(np.int64)
    parts = _parts(lengths, max_slots(num_kv_heads, target_programs))
    # Part p of a tile covers the keys [p, p + 1) * share, up to the tile's end.
    share = -(-lengths // parts)
    share = -(-share // _SPLIT_ALIGNMENT) * _SPLIT_ALIGNMENT
    parts = -(-lengths // share)
    owner = np.repeat(np.arange(len(tiles)), parts)
    part = np.arange(len(owner)) - np.repeat(np.cumsum(parts) - parts, parts)
    split = parts > 1
    slot_counts = np.where(split, parts, 0)
    first_slots = np.cumsum(slot_counts) - slot_counts
    dense = np.empty((len(owner), 8), dtype=np.int32)
    dense[:, :4] = tiles[owner]
    dense[:, 4] = part * share[owner]
    dense[:, 5] = np.minimum((part + 1) * share[owner], lengths[owner])
    dense[:, 6] = DENSE
    dense[:, 7] = np.where(split[owner], first_slots[owner] + part, WHOLE)

    tiles_in_band = _cut_tiles(band, tile_rows)
    end = tiles_in_band[:, 3] + tiles_in_band[:, 2]
    sparse = np.empty((len(tiles_in_band), 8), dtype=np.int32)
    sparse[:, :4] = tiles_in_band
    sparse[:, 6] = np.minimum(n_init, end)
    sparse[:, 4] = np.maximum(tiles_in_band[:, 3].astype(np.int64) - n_local + 1, sparse[:, 6])
    sparse[:, 5] = end
    sparse[:, 7] = WHOLE

    merges = np.stack([tiles[:, 1], tiles[:, 2], first_slots, parts], axis=1)[split].astype(np.int32)
    return Work(np.concatenate([dense, sparse]), merges, int(slot_counts.sum()))


def _parts(lengths: np.ndarray, slots: int) -> np.ndarray:
    """Into how many parts each tile's keys are split; at most ``slots`` in all where any is split."""
    parts = np.ones(len(lengths), dtype=np.int64)
    spare = slots - len(lengths)
    if spare > 0 and len(lengths):
        parts += spare * lengths // lengths.sum()
    return np.minimum(parts, np.maximum(1, lengths // _MIN_SPLIT_KEYS))


def _cut_tiles(spans: Sequence[Span], tile_rows: int) -> np.ndarray:
    """[num_tiles, 4] int32: request, first row, rows, position of the first row."""
    table = np.array(spans, dtype=np.int32).reshape(-1, 4)
    counts = -(-table[:, 2] // tile_rows)
    tiles = np.repeat(table, counts, axis=0)
    # Row offset of each tile within its span.
    offsets = (np.arange(len(tiles), dtype=np.int32) - np.repeat(np.cumsum(counts) - counts, counts)) * tile_rows
    tiles[:, 1] += offsets
    tiles[:, 3] += offsets
    tiles[:, 2] = np.minimum(tile_rows, tiles[:, 2] - offsets)
    return tiles.astype(np.int32, copy=False)
