"""FlexPrefill: each head chooses, chunk by chunk, between blocks by pooled attention and columns with diagonals, and
takes as many as hold a share ``gamma`` of the attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_trimix.patterns.base import STRICT, BlockSize, OneKind, per_head, tiles_of
from vllm_trimix.patterns.estimate import (
    block_means,
    kept_columns,
    pooled_scores,
    slash_blocks,
)
from vllm_trimix.patterns.selection import EVERYTHING, Chunk, Selection, Tiles
from vllm_trimix.untrusted import MAX_TOKENS

MAX_COLUMNS = 1024
"""A head that needs more single keys sees their whole blocks instead, so that memory stays bounded."""

DENSE_KEYS = 256


@dataclass(frozen=True, config=STRICT)
class FlexPrefill(OneKind):
    """Parameters.

    Attributes:
        gamma: Share of the attention that the chosen keys must hold; 0 leaves the first block and a tile's own.
        tau: Largest Jensen-Shannon distance between pooled and true attention of the last block at which a head trusts
            the pooled one; 0 makes every head vertical-slash.
        block_size: Rows of a tile and keys of a block.
        min_budget: At least so many keys, and so many diagonals, in tokens, whatever holds ``gamma``; those of a head
            that trusts the pooled attention come on top of its blocks.
        max_budget: At most so many, in tokens; None for any number.
    """

    name: ClassVar[str] = "flexprefill"
    source: ClassVar[str] = "FlexPrefill (arXiv 2502.20766), algorithms 1 to 4"
    last_rows: ClassVar[int] = 128
    has_columns: ClassVar[bool] = True
    has_band: ClassVar[bool] = False

    gamma: float = Field(default=0.95, ge=0, le=1)
    tau: float = Field(default=0.1, ge=0, le=1)
    block_size: BlockSize = 128
    min_budget: int = Field(default=0, ge=0, le=2**20)
    max_budget: int | None = Field(default=None, ge=1, le=MAX_TOKENS)

    def __post_init__(self) -> None:
        """Raises ValueError: a least budget above the most."""
        if self.max_budget is not None and self.min_budget > self.max_budget:
            raise ValueError(f"min_budget: {self.min_budget} is more than max_budget ({self.max_budget}); lower it")

    @property
    def budget(self) -> None:
        """As many as hold ``gamma``."""
        return None

    @classmethod
    def select(cls, heads: Sequence[FlexPrefill], chunk: Chunk) -> Selection:
        """Both choices for every head; the distance decides which one counts, without the host knowing."""
        device = chunk.q.device
        tiles = tiles_of(heads[0].block_size, chunk)
        if chunk.num_keys <= DENSE_KEYS:
            return Selection(tiles, tiles.causal(device).expand(len(heads), -1, -1))
        gamma = per_head(tuple(head.gamma for head in heads), device)
        tau = per_head(tuple(head.tau for head in heads), device)
        columns, slashes = chunk.last_sums(cls.last_rows)
        k_means = block_means(chunk.k, tiles.block_size)
        pooled = _query_aware(chunk, tiles, k_means[:, : tiles.num_blocks], gamma)
        trusts = _distance(chunk, k_means, columns, tiles.block_size) < tau
        # Whole numbers: 0 and 0.0 are one key of the cache.
        least = per_head(tuple(head.min_budget for head in heads), device).long()
        most = per_head(tuple(head.max_budget or EVERYTHING for head in heads), device).long()

        def bounded(counts: torch.Tensor) -> torch.Tensor:
            return torch.where(trusts, least, counts.clamp(least, most))

        blocks, kept = _vertical_slash(tiles, columns, slashes, gamma, bounded)
        blocks |= pooled & trusts[:, None, None]
        blocks[:, :, 0] = True
        blocks.diagonal(tiles.first, 1, 2).fill_(True)
        return Selection(tiles, blocks & tiles.causal(device), columns=kept)


def _distance(chunk: Chunk, k_means: torch.Tensor, columns: torch.Tensor, block_size: int) -> torch.Tensor:
    """Jensen-Shannon distance of the last rows' pooled attention to their true one, by block, fp32 [num_heads]."""
    q_mean = chunk.q_last[:, -FlexPrefill.last_rows :].float().mean(1, keepdim=True)
    reach = torch.ones(1, k_means.shape[1], dtype=torch.bool, device=columns.device)
    estimated = torch.softmax(pooled_scores(q_mean, k_means, chunk.scale, reach), dim=-1)[:, 0]
    true = F.pad(columns, (0, -columns.shape[1] % block_size)).view(len(columns), -1, block_size).sum(2)
    true = true / true.sum(1, keepdim=True)
    middle = (estimated + true) / 2
    divergence = (torch.special.xlogy(estimated, estimated / middle) + torch.special.xlogy(true, true / middle)).sum(1)
    return (divergence / 2).clamp(min=0).sqrt()


def _query_aware(chunk: Chunk, tiles: Tiles, k_means: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """The fewest blocks of the whole chunk that hold ``gamma`` of the pooled attention (algorithm 4)."""
    q_means = block_means(chunk.q, tiles.block_size, offset=tiles.position % tiles.block_size)
    scores = pooled_scores(q_means, k_means, chunk.scale, tiles.causal(chunk.q.device))
    probs = torch.softmax(scores, dim=-1).flatten(1) / tiles.num_tiles
    ranked = probs.sort(dim=1, descending=True)
    kept = _fewest(ranked.values, gamma)
    rank = torch.arange(probs.shape[1], device=probs.device)
    blocks = torch.zeros(probs.shape, dtype=torch.bool, device=probs.device)
    return blocks.scatter_(1, ranked.indices, rank < kept[:, None]).view(scores.shape)


def _vertical_slash(
    tiles: Tiles,
    columns: torch.Tensor,
    slashes: torch.Tensor,
    gamma: torch.Tensor,
    bounded: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Blocks and single keys: the fewest columns, and the fewest diagonals, that hold ``gamma`` (algorithm 3).

    ``bounded`` makes of the numbers of a kind what the budgets allow.
    """
    device, num_keys = columns.device, columns.shape[1]
    total = columns.sum(1, keepdim=True)
    behind = tiles.numbers(device)[:, None] - torch.arange(tiles.num_blocks, device=device)
    rank = torch.arange(num_keys, device=device)

    ranked = (slashes / total).sort(dim=1, descending=True)
    chosen = torch.zeros(slashes.shape, dtype=torch.bool, device=device)
    chosen.scatter_(1, ranked.indices, rank < bounded(_fewest(ranked.values, gamma))[:, None])
    blocks = slash_blocks(chosen, behind, tiles.block_size)

    ranked = (columns / total).sort(dim=1, descending=True)
    counts = bounded(_fewest(ranked.values, gamma))
    widened = counts > MAX_COLUMNS
    chosen = torch.zeros(columns.shape, dtype=torch.bool, device=device)
    chosen.scatter_(1, ranked.indices, (rank < counts[:, None]) & widened[:, None])
    holds = F.pad(chosen, (0, -num_keys % tiles.block_size)).view(len(columns), -1, tiles.block_size).any(2)
    blocks |= holds[:, None, : tiles.num_blocks]
    kept = kept_columns(ranked.indices[:, :MAX_COLUMNS], torch.where(widened, 0, counts), EVERYTHING)
    return blocks, kept


def _fewest(shares: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """How many of the descending shares, [num_heads, count], sum up to ``gamma``, [num_heads]."""
    return ((shares.cumsum(1) < gamma[:, None]).sum(1) + 1) * (gamma > 0)
