"""MInference's vertical-slash: the keys and the distances that the chunk's last rows attend to most."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_trimix.patterns.base import STRICT, BlockSize, OneKind, per_head, tiles_of
from vllm_trimix.patterns.estimate import kept_columns, slash_blocks
from vllm_trimix.patterns.selection import EVERYTHING, Chunk, Selection

FORCED_COLUMNS = 30
FORCED_SLASHES = 100


@dataclass(frozen=True, config=STRICT)
class VerticalSlash(OneKind):
    """Budgets; defaults of MInference's configurations for 128K models.

    Attributes:
        vertical_size: Keys (verticals) that every later row sees, the first 30 among them.
        slash_size: Distances i - j (slashes), the nearest 100 first; a tile sees the blocks that one crosses.
        block_size: Rows of a tile and keys of a block.
    """

    name: ClassVar[str] = "vertical_slash"
    source: ClassVar[str] = "MInference (arXiv 2407.02490), vertical-slash"
    last_rows: ClassVar[int] = 64
    has_columns: ClassVar[bool] = True
    has_band: ClassVar[bool] = False

    vertical_size: int = Field(default=1000, ge=FORCED_COLUMNS, le=2**15)
    slash_size: int = Field(default=6096, ge=50, le=2**20)
    block_size: BlockSize = 64

    @property
    def budget(self) -> int:
        """A key for each vertical and each slash."""
        return self.vertical_size + self.slash_size

    @classmethod
    def select(cls, heads: Sequence[VerticalSlash], chunk: Chunk) -> Selection:
        """The largest sums over the attention of the chunk's last 64 rows."""
        device, num_keys = chunk.q.device, chunk.num_keys
        tiles = tiles_of(heads[0].block_size, chunk)
        columns, slashes = chunk.last_sums(cls.last_rows)
        columns[:, :FORCED_COLUMNS] = math.inf
        # Larger than any sum, and the nearest the largest: a budget may be smaller than what is forced.
        nearest = slashes[:, :FORCED_SLASHES]
        nearest.copy_(torch.arange(nearest.shape[1], 0, -1, device=device) + float(cls.last_rows))
        vertical_sizes, slash_sizes = zip(*((head.vertical_size, head.slash_size) for head in heads), strict=True)
        ranked = columns.topk(min(max(vertical_sizes), num_keys), dim=1).indices
        kept = kept_columns(ranked, per_head(vertical_sizes, device), EVERYTHING)
        ranked = slashes.topk(min(max(slash_sizes), num_keys), dim=1).indices
        rank = torch.arange(ranked.shape[1], device=device)
        in_budget = rank < per_head(slash_sizes, device)[:, None]
        chosen = torch.zeros(slashes.shape, dtype=torch.bool, device=device).scatter_(1, ranked, in_budget)
        behind = tiles.numbers(device)[:, None] - torch.arange(tiles.num_blocks, device=device)
        return Selection(tiles, slash_blocks(chosen, behind, tiles.block_size), columns=kept)
