"""XAttention: blocks by the sums of their antidiagonals, as many for each tile as hold a share of the attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_trimix.patterns.base import STRICT, BlockSize, per_head, tiles_of
from vllm_trimix.patterns.estimate import MAX_SCORES
from vllm_trimix.patterns.selection import Chunk, Selection, Tiles


@dataclass(frozen=True, config=STRICT)
class XAttention:
    """Parameters.

    Attributes:
        threshold: Share of a tile's estimated attention that its blocks must hold; its own and the first block come on
            top, and are all that 0 leaves.
        stride: Distance of the antidiagonals that are summed; larger is faster and coarser.
        block_size: Rows of a tile and keys of a block.
    """

    name: ClassVar[str] = "xattention"
    source: ClassVar[str] = "XAttention (arXiv 2503.16428), algorithm 1"
    last_rows: ClassVar[int] = 0
    has_columns: ClassVar[bool] = False
    has_band: ClassVar[bool] = False

    threshold: float = Field(default=0.9, ge=0, le=1)
    stride: int = Field(default=8, ge=4, le=64, multiple_of=4)
    block_size: BlockSize = 128

    def __post_init__(self) -> None:
        """Raises ValueError: a block is no multiple of the stride."""
        if self.block_size % self.stride:
            raise ValueError(f"stride: {self.stride} does not divide block_size ({self.block_size}); choose 4, 8 or 16")

    @property
    def budget(self) -> None:
        """As many as hold ``threshold``."""
        return None

    @property
    def kind(self) -> tuple[str, int]:
        """Heads of one kind are selected together."""
        return self.name, self.stride

    @classmethod
    def select(cls, heads: Sequence[XAttention], chunk: Chunk) -> Selection:
        """Each tile's own choice: other tiles and the chunk's end don't matter."""
        device = chunk.q.device
        tiles = tiles_of(heads[0].block_size, chunk)
        causal = tiles.causal(device)
        shares = antidiagonal_shares(chunk, tiles, heads[0].stride)
        ranked = shares.sort(dim=2, descending=True)
        threshold = per_head(tuple(head.threshold for head in heads), device)[:, None, None]
        # A block is needed while those before it hold less than the threshold.
        needed = ranked.values.cumsum(2) - ranked.values < threshold
        blocks = torch.zeros(shares.shape, dtype=torch.bool, device=device).scatter_(2, ranked.indices, needed)
        blocks[:, :, 0] = True
        blocks.diagonal(tiles.first, 1, 2).fill_(True)
        return Selection(tiles, blocks & causal)


def antidiagonal_shares(chunk: Chunk, tiles: Tiles, stride: int) -> torch.Tensor:
    """Estimated attention of each tile by block, rows of sum 1: fp32 [num_heads, num_tiles, num_blocks].

    Every ``stride`` rows become one, in reverse order, against as many keys in order: their product is the sum of an
    antidiagonal of the scores.
    """
    group = len(chunk.q) // len(chunk.k)
    # Some KV heads at a time: their keys are copied in fp32.
    at_once = max(1, MAX_SCORES // (chunk.num_keys * chunk.q.shape[2]))
    shares = []
    for first in range(0, len(chunk.k), at_once):
        q = chunk.q[first * group : (first + at_once) * group]
        shares.append(_shares(q, chunk.k[first : first + at_once], chunk.scale, tiles, stride))
    return torch.cat(shares)


def _shares(q: torch.Tensor, k: torch.Tensor, scale: float, tiles: Tiles, stride: int) -> torch.Tensor:
    num_heads, num_rows, head_size = q.shape
    num_kv_heads, device = len(k), q.device
    offset = tiles.position % tiles.block_size
    end = tiles.num_blocks * tiles.block_size
    k = k[:, :end]
    k = F.pad(k, (0, 0, 0, end - k.shape[1])).reshape(num_kv_heads, -1, stride * head_size).float()
    q = F.pad(q, (0, 0, offset, tiles.num_tiles * tiles.block_size - offset - num_rows))
    q = q.view(num_heads, -1, stride, head_size).flip(2).reshape(num_heads, -1, stride * head_size).float()
    q *= scale / stride
    per_tile = tiles.block_size // stride
    # Rows that the chunk has none of count for nothing.
    first_row = torch.arange(q.shape[1], device=device) * stride
    real = ((first_row + stride > offset) & (first_row < offset + num_rows)).float()[:, None]
    part = max(1, MAX_SCORES // (num_heads * per_tile * k.shape[1]))
    shares = []
    for tile in range(0, tiles.num_tiles, part):
        rows = slice(tile * per_tile, (tile + part) * per_tile)
        queries = q[:, rows].reshape(num_kv_heads, -1, q.shape[2])
        scores = torch.bmm(queries, k.transpose(1, 2)).view(num_heads, -1, k.shape[1])
        number = torch.arange(scores.shape[1], device=device) + tiles.first * per_tile + rows.start
        scores.masked_fill_(torch.arange(k.shape[1], device=device) > number[:, None], -math.inf)
        probs = torch.softmax(scores, dim=-1) * real[rows]
        shares.append(probs.view(num_heads, -1, per_tile, tiles.num_blocks, per_tile).sum((2, 4)))
    sums = torch.cat(shares, 1)
    return sums / sums.sum(2, keepdim=True)
