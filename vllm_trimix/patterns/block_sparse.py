"""MInference's block-sparse: for each tile of rows the key blocks whose mean looks most like the tile's mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_trimix.patterns.base import STRICT, BlockSize, OneKind, per_head, tiles_of
from vllm_trimix.patterns.estimate import block_means, pooled_scores
from vllm_trimix.patterns.selection import Chunk, Selection


@dataclass(frozen=True, config=STRICT)
class BlockSparse(OneKind):
    """Budget.

    Attributes:
        top_k: Blocks of a tile; the first and the tile's own are always among them, which the published code leaves
            to chance.
        block_size: Rows of a tile and keys of a block.
    """

    name: ClassVar[str] = "block_sparse"
    source: ClassVar[str] = "MInference (arXiv 2407.02490), block-sparse"
    last_rows: ClassVar[int] = 0
    has_columns: ClassVar[bool] = False
    has_band: ClassVar[bool] = False

    top_k: int = Field(default=100, ge=2, le=2**14)
    block_size: BlockSize = 64

    @property
    def budget(self) -> int:
        """The keys of whole blocks."""
        return self.top_k * self.block_size

    @classmethod
    def select(cls, heads: Sequence[BlockSparse], chunk: Chunk) -> Selection:
        """The largest scores of mean-pooled queries and keys, causal."""
        device = chunk.q.device
        tiles = tiles_of(heads[0].block_size, chunk)
        q_means = block_means(chunk.q, tiles.block_size, offset=tiles.position % tiles.block_size)
        k_means = block_means(chunk.k, tiles.block_size)[:, : tiles.num_blocks]
        causal = tiles.causal(device)
        scores = pooled_scores(q_means, k_means, chunk.scale, causal)
        scores[:, :, 0] = math.inf
        scores.diagonal(tiles.first, 1, 2).fill_(math.inf)
        budgets = tuple(head.top_k for head in heads)
        ranked = scores.topk(min(max(budgets), tiles.num_blocks), dim=2).indices
        rank = torch.arange(ranked.shape[2], device=device)
        in_budget = rank < per_head(budgets, device)[:, None, None]
        blocks = torch.zeros(scores.shape, dtype=torch.bool, device=device)
        return Selection(tiles, blocks.scatter_(2, ranked, in_budget.expand_as(ranked)) & causal)
