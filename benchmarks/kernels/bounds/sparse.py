"""Bounds of a layer with a dynamic pattern: the sparse kernel by density, the estimate, and the choice of keys."""

from __future__ import annotations

import functools

import numpy as np

from benchmarks.kernels.bounds.bound import NOTHING, Bound, flat, launch_bound, step_cost
from benchmarks.kernels.bounds.compiled import SERVED, compiled
from benchmarks.kernels.bounds.devices import device_named
from benchmarks.kernels.bounds.layer import HEAD_SIZE, KEY_BYTES, NUM_HEADS, ROW_BYTES
from vllm_trimix.kernels.triton_configs import estimate_config_for, sparse_config_for

DENSITIES = (0.05, 0.1, 0.2, 0.5, 1.0)
BLOCK_SIZES = (64, 128)
ESTIMATE_ROWS = 64
"""Of vertical-slash."""
_PART_KEYS = 1024  # As ``vllm_trimix.kernels.triton_estimate``.
# Bytes of one block of one tile and head while it is chosen and listed, written once and read once; as
# ``vllm_trimix.backend.dynamic`` counts them.
_CHOICE_BYTES = 2 * (40 + 17)


@functools.cache
def predict_sparse(
    device_name: str,
    start: int,
    end: int,
    density: float,
    *,
    block_size: int = 128,
    shared: bool = True,
    triton: str = SERVED,
) -> Bound:
    """The least time of the sparse kernel for a chunk of one layer, 32 query heads, blocks alone.

    Args:
        device_name: A key of ``DEVICES``.
        start: Position of the chunk's first row.
        end: Position behind its last.
        density: Keys read over keys before the rows, by tile; a tile's own block is always read.
        block_size: Rows of a tile and keys of a block.
        shared: Whether programs that run together find each other's keys in L2, so that each comes from memory once
            for all tiles. They do as far as neighbouring tiles and the heads of a KV head choose the same blocks.
        triton: Version that compiled the kernel.

    Raises:
        ValueError: An unknown device or version, or a density outside (0, 1].
    """
    if not 0 < density <= 1:
        raise ValueError(f"density {density} is outside (0, 1]")
    device = device_named(device_name)
    tile = sparse_config_for(HEAD_SIZE, 2, 2, block_size, device.capability)
    kernel = compiled(f"sparse-{block_size}", device.capability, triton=triton)
    if end <= start:
        return NOTHING
    tiles = np.arange(start // block_size, (end - 1) // block_size + 1)
    blocks = np.maximum(1, np.round(density * (tiles + 1)))
    # Longest first; heads beside each other.
    steps = np.repeat(blocks[::-1], block_size // tile.block_m * NUM_HEADS) * (block_size / tile.block_n)
    keys_read = float(steps.sum()) * tile.block_n * 2 * 2 * HEAD_SIZE
    rows = (end - start) * ROW_BYTES
    from_memory = max(end - start, density * end) * KEY_BYTES if shared else keys_read
    return launch_bound(
        device,
        step_cost(device, tile, kernel, head_size=HEAD_SIZE),
        kernel,
        steps,
        l2_bytes=keys_read + rows,
        hbm_bytes=2 * rows + from_memory,
    )


@functools.cache
def predict_estimate(device_name: str, keys: int, *, rows: int = ESTIMATE_ROWS, triton: str = SERVED) -> Bound:
    """The least time of the estimate of vertical-slash patterns: both passes over all keys, 32 heads.

    Args:
        device_name: A key of ``DEVICES``.
        keys: Keys so far.
        rows: Last rows.
        triton: Version that compiled the kernel.
    """
    device = device_named(device_name)
    tile = estimate_config_for(HEAD_SIZE, 2)
    groups, parts = -(-rows // tile.block_m), -(-keys // _PART_KEYS)
    total = NOTHING
    for name, more in (("estimate-stats", 0), ("estimate-sums", 1)):
        kernel = compiled(name, device.capability, triton=triton)
        # The second pass walks one block more, where diagonals end.
        steps = np.full(NUM_HEADS * groups * parts, _PART_KEYS / tile.block_n + more)
        total += launch_bound(
            device,
            step_cost(device, tile, kernel, head_size=HEAD_SIZE, products=1),
            kernel,
            steps,
            l2_bytes=float(steps.sum()) * tile.block_n * 2 * HEAD_SIZE,
            hbm_bytes=keys * KEY_BYTES / 2 + (2 * 4 * NUM_HEADS * groups * keys if more else 0),
        )
    return total


def predict_selection(device_name: str, rows: int, keys: int, *, block_size: int = 128) -> Bound:
    """What choosing blocks by their means must move for a chunk of one layer: keys, queries, scores and lists.

    Launches and their gaps are not in it.

    Args:
        device_name: A key of ``DEVICES``.
        rows: Rows of the chunk.
        keys: Keys so far.
        block_size: Rows of a tile and keys of a block.
    """
    device = device_named(device_name)
    # Keys are gathered (read, written) and read once more for their means; queries are copied and read likewise.
    gathered = 3 * (keys * KEY_BYTES / 2 + rows * ROW_BYTES)
    entries = NUM_HEADS * -(-rows // block_size) * -(-keys // block_size)
    return flat((gathered + entries * _CHOICE_BYTES) / device.hbm_bytes_s, "HBM")
