"""The lists that the sparse kernels walk, made of a selection on its own device, without waiting for it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from vllm_trimix.patterns.selection import Selection, Tiles


class SparseIndex(NamedTuple):
    """Key blocks and single keys of each tile of query rows; every key at most once for a tile.

    Attributes:
        tiles: The rows.
        block_count: Blocks of a tile, int32 [num_heads, num_tiles], at least 1.
        block_index: Their numbers, ascending, the tile's own last, int32 [num_heads, num_tiles, max_blocks]; what lies
            past a tile's count is undefined.
        column_count: Single keys of a tile, int32 [num_heads, num_tiles]; None when no head has any.
        column_index: Their positions, ascending, all before the tile and in none of its blocks,
            int32 [num_heads, num_tiles, max_columns]; past a tile's count undefined. None likewise.
        band: As ``Selection.band``: of blocks' keys, those below ``band[0]`` or fewer than ``band[1]`` back.
    """

    tiles: Tiles
    block_count: torch.Tensor
    block_index: torch.Tensor
    column_count: torch.Tensor | None
    column_index: torch.Tensor | None
    band: torch.Tensor | None

    def keys_read(self) -> torch.Tensor:
        """Keys that a kernel loads for each tile, int32 [num_heads, num_tiles]; its own block up to its last row."""
        tiles = self.tiles
        ends = (tiles.numbers(self.block_count.device) + 1) * tiles.block_size
        unread = (ends - (tiles.position + tiles.num_rows)).clamp(min=0)
        keys = self.block_count * tiles.block_size - unread
        return (keys if self.column_count is None else keys + self.column_count).int()


class Place(NamedTuple):
    """Where an index's rows and heads lie in the step.

    Attributes:
        request: Row of the block table.
        first_row: First row in the batch.
        first_head: First query head, on this device.
    """

    request: int
    first_row: int
    first_head: int


def build_index(selection: Selection) -> SparseIndex:
    """Lists a selection's blocks and, of its columns, for each tile those before it that no block holds."""
    tiles, blocks, columns = selection.tiles, selection.blocks, selection.columns
    numbers = torch.arange(tiles.num_blocks, dtype=torch.int32, device=blocks.device)
    block_count, block_index = _compact(blocks, numbers.expand_as(blocks))
    if columns is None:
        return SparseIndex(tiles, block_count, block_index, None, None, selection.band)
    num_heads, max_columns = columns.shape
    owner = (columns // tiles.block_size).clamp(max=tiles.num_blocks - 1)
    wide = owner[:, None].expand(num_heads, tiles.num_tiles, max_columns)
    before = columns[:, None] < (tiles.numbers(blocks.device) * tiles.block_size)[None, :, None]
    keep = before & ~blocks.gather(2, wide)
    column_count, column_index = _compact(keep, columns.int()[:, None].expand_as(keep))
    return SparseIndex(tiles, block_count, block_index, column_count, column_index, selection.band)


def idle_index(block_size: int, device: torch.device, *, has_columns: bool, has_band: bool) -> SparseIndex:
    """An index of one head without rows: a launch that compiles what serving will launch, and writes nothing.

    Args:
        block_size: Rows of a tile of the indices to come.
        device: Where they will be.
        has_columns: Whether they will list columns.
        has_band: Whether they will have a band.
    """
    zeros = torch.zeros(1, 1, 2, dtype=torch.int32, device=device)
    return SparseIndex(
        tiles=Tiles(block_size, 0, 0),
        block_count=zeros[..., 0],
        block_index=zeros,
        column_count=zeros[..., 0] if has_columns else None,
        column_index=zeros if has_columns else None,
        band=zeros[0] if has_band else None,
    )


def _compact(keep: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts of the kept values in the last dimension, and the values themselves, first."""
    place = keep.cumsum(-1, dtype=torch.int32)
    count = place[..., -1].contiguous()
    # What is not kept goes to one more place, which is cut off.
    size = keep.shape[-1]
    place = torch.where(keep, place - 1, size).long()
    compact = torch.empty(*keep.shape[:-1], size + 1, dtype=torch.int32, device=keep.device)
    compact.scatter_(-1, place, values)
    return count, compact[..., :size]
