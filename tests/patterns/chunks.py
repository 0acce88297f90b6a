"""Inputs of the pattern tests: a prompt, and chunks of it."""

from __future__ import annotations

from typing import NamedTuple

import torch

from tests.patterns.truth import Head
from vllm_trimix.patterns.selection import Chunk

SCALE = 0.25


class Prompt(NamedTuple):
    """Queries [num_heads, num_positions, 16] and keys [num_kv_heads, num_positions, 16] of a whole prompt."""

    q: torch.Tensor
    k: torch.Tensor

    def chunk(self, position: int, num_rows: int, num_keys: int | None = None) -> Chunk:
        """Sparse rows from ``position`` on; with more keys than they need, dense last rows follow in the same chunk."""
        num_keys = position + num_rows if num_keys is None else num_keys
        return Chunk(
            q=self.q[:, position : position + num_rows],
            q_last=self.q[:, max(position, num_keys - 128) : num_keys],
            k=self.k[:, :num_keys],
            position=position,
            scale=SCALE,
        )

    def head(self, number: int, chunk: Chunk) -> Head:
        """One head of a chunk, for the truth."""
        kv_head = number // (len(self.q) // len(self.k))
        return Head(
            q=self.q[number].double().numpy(),
            k=self.k[kv_head, : chunk.num_keys].double().numpy(),
            position=chunk.position,
            num_rows=chunk.num_rows,
            num_last=chunk.q_last.shape[1],
            scale=SCALE,
        )


def random_prompt(
    length: int, *, num_heads: int = 4, num_kv_heads: int = 2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Prompt:
    """Queries and keys with a share in common, that differs from block to block, so that blocks matter."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(heads: int) -> torch.Tensor:
        blocks = torch.randn(heads, -(-length // 64), 16, generator=generator).repeat_interleave(64, 1)[:, :length]
        return (1.5 * torch.randn(heads, length, 16, generator=generator) + blocks).to(dtype)

    return Prompt(tokens(num_heads), tokens(num_kv_heads))
