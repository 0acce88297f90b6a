"""What a dynamic pattern selects: blocks and single columns of keys, per head and tile of query rows.

Tiles and key blocks lie at absolute multiples of ``block_size``: where a chunk of the prompt starts moves no border.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from vllm_trimix.patterns.estimate import column_and_slash_sums

EVERYTHING = 2**31 - 1
"""A window that hides nothing."""


class Chunk(NamedTuple):
    """One request's rows of a step and all its keys so far, for some heads.

    Query head h reads KV head ``h // (num_heads // num_kv_heads)``.

    Attributes:
        q: The sparse rows, [num_heads, num_rows, head_size].
        q_last: The chunk's last prompt rows, dense ones included, that an estimate may use,
            [num_heads, num_last, head_size]; their positions are the last of ``k``.
        k: All keys so far, [num_kv_heads, num_keys, head_size].
        position: Absolute position of the first sparse row.
        scale: Softmax scale.
        sums: A kernel for ``last_sums`` of all of these heads; None computes them from ``k``.
    """

    q: torch.Tensor
    q_last: torch.Tensor
    k: torch.Tensor
    position: int
    scale: float
    sums: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None

    def last_sums(self, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Column and slash sums of the attention of the last ``num_rows`` rows; see ``column_and_slash_sums``."""
        q_last = self.q_last[:, -num_rows:]
        return self.sums(q_last) if self.sums else column_and_slash_sums(q_last, self.k, self.scale)

    @property
    def num_heads(self) -> int:
        return self.q.shape[0]

    @property
    def num_rows(self) -> int:
        return self.q.shape[1]

    @property
    def num_keys(self) -> int:
        return self.k.shape[1]


class Tiles(NamedTuple):
    """The tiles of a range of rows: those blocks of positions that hold a row.

    Attributes:
        block_size: Rows of a tile, and keys of a block.
        position: Absolute position of the first row.
        num_rows: Rows.
    """

    block_size: int
    position: int
    num_rows: int

    @property
    def first(self) -> int:
        """Number of the first tile, counted from position 0; also the number of its diagonal block."""
        return self.position // self.block_size

    @property
    def num_tiles(self) -> int:
        return (self.position + self.num_rows - 1) // self.block_size - self.first + 1

    @property
    def num_blocks(self) -> int:
        """Key blocks that some row may see."""
        return self.first + self.num_tiles

    def numbers(self, device: torch.device) -> torch.Tensor:
        """Number of each tile, [num_tiles], int64."""
        return torch.arange(self.first, self.first + self.num_tiles, device=device)

    def causal(self, device: torch.device) -> torch.Tensor:
        """Blocks not after each tile's own, bool [num_tiles, num_blocks]."""
        return torch.arange(self.num_blocks, device=device) <= self.numbers(device)[:, None]


@dataclass(frozen=True)
class Selection:
    """The keys that each row of a chunk sees, per head.

    Row i of tile t sees key j <= i when block ``j // block_size`` is selected for t and j is in the head's band, or
    when j is one of the head's columns. A head has columns, or a band that hides something, not both: an index drops
    the columns of a listed block.

    Attributes:
        tiles: The rows.
        blocks: Selected key blocks, bool [num_heads, num_tiles, num_blocks]; each tile's own block among them,
            none after it.
        columns: Selected single keys, ascending, [num_heads, max_columns], int64; places past a head's last hold
            ``EVERYTHING``. None: no head has any.
        band: Of the selected blocks a row sees only keys below ``band[0]`` or fewer than ``band[1]`` positions back,
            int32 [num_heads, 2]. None: all.
    """

    tiles: Tiles
    blocks: torch.Tensor
    columns: torch.Tensor | None = None
    band: torch.Tensor | None = None

    def part(self, first: int, stop: int) -> Selection:
        """The tiles ``[first, stop)`` of it."""
        size = self.tiles.block_size
        start = max(self.tiles.position, (self.tiles.first + first) * size)
        end = min(self.tiles.position + self.tiles.num_rows, (self.tiles.first + stop) * size)
        tiles = Tiles(size, start, end - start)
        return Selection(tiles, self.blocks[:, first:stop, : tiles.num_blocks], self.columns, self.band)

    def mask(self, num_keys: int) -> torch.Tensor:
        """Visibility of keys, the definition every kernel is tested against: bool [num_heads, num_rows, num_keys]."""
        tiles, device = self.tiles, self.blocks.device
        i = torch.arange(tiles.position, tiles.position + tiles.num_rows, device=device)[:, None]
        j = torch.arange(num_keys, device=device)[None, :]
        block = j[0] // tiles.block_size
        in_reach = block < tiles.num_blocks
        visible = self.blocks[:, i[:, 0] // tiles.block_size - tiles.first][:, :, block.clamp(max=tiles.num_blocks - 1)]
        visible &= in_reach
        if self.band is not None:
            n_init, n_local = self.band[:, 0, None, None], self.band[:, 1, None, None]
            visible &= (j < n_init) | (i - j < n_local)
        if self.columns is not None:
            visible |= (self.columns[:, :, None] == j).any(1)[:, None]
        return visible & (j <= i)


def merge(selections: list[tuple[torch.Tensor, Selection]], num_heads: int) -> Selection:
    """One selection of several, each for some heads.

    Args:
        selections: Head indices, int64, and their selection; together every head once, all over the same rows.
        num_heads: Heads.
    """
    tiles = selections[0][1].tiles
    device = selections[0][1].blocks.device
    if len(selections) == 1 and len(selections[0][0]) == num_heads:
        return selections[0][1]
    blocks = torch.empty(num_heads, tiles.num_tiles, tiles.num_blocks, dtype=torch.bool, device=device)
    max_columns = max(0 if part.columns is None else part.columns.shape[1] for _, part in selections)
    columns = torch.full((num_heads, max_columns), EVERYTHING, device=device) if max_columns else None
    banded = any(part.band is not None for _, part in selections)
    band = torch.full((num_heads, 2), EVERYTHING, dtype=torch.int32, device=device) if banded else None
    for heads, part in selections:
        blocks[heads] = part.blocks
        if columns is not None and part.columns is not None:
            columns[heads, : part.columns.shape[1]] = part.columns
        if band is not None and part.band is not None:
            band[heads] = part.band
    return Selection(tiles, blocks, columns, band)
