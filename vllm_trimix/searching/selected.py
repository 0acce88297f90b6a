"""Attention over a selection in plain PyTorch, in blocks of rows: memory is linear in the keys.

Every pattern, soft-capped scores too. The block of rows reads the keys that one of its rows may see, not all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from vllm_trimix.kernels.sparse_index import build_index
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.selection import Chunk, Selection, Tiles

BLOCK_ROWS = 128
# Scores of one block of rows, fp32, at most; and entries of an index that is only counted.
MAX_SCORES = 2**24
_MAX_INDEX = 2**22


class Rule(NamedTuple):
    """How a layer makes scores of products.

    Attributes:
        scale: Softmax scale.
        soft_cap: Scores become ``soft_cap * tanh(score / soft_cap)``; 0 is off.
    """

    scale: float
    soft_cap: float = 0.0

    def scores(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """fp32 [num_heads, num_rows, num_keys] of q [num_heads, num_rows, head_size], k [num_keys, head_size]."""
        scores = (q.float() * self.scale) @ k.float().T
        return scores if not self.soft_cap else self.soft_cap * torch.tanh(scores / self.soft_cap)


def chunks(q: torch.Tensor, k: torch.Tensor, *, num_sparse: int, chunk: int | None, scale: float) -> Iterator[Chunk]:
    """What a pattern sees of a prompt that is prefilled in chunks.

    Args:
        q: Queries of the prompt, [num_heads, prompt_len, head_size].
        k: Its keys, [num_kv_heads, prompt_len, head_size].
        num_sparse: First rows of the prompt that are sparse.
        chunk: Tokens of a chunk; None: the whole prompt.
        scale: Softmax scale.
    """
    prompt_len = q.shape[1]
    for begin in range(0, num_sparse, chunk or prompt_len):
        end = min(begin + (chunk or prompt_len), prompt_len)
        yield Chunk(q[:, begin : min(end, num_sparse)], q[:, begin:end], k[:, :end], begin, scale)


def select(patterns: Sequence[DynamicPattern], chunk: Chunk) -> Selection:
    """The choice of heads of one kind."""
    return patterns[0].select(patterns, chunk)


def keys_read(selection: Selection) -> torch.Tensor:
    """Keys that the kernels load for a selection's rows, tile by tile, float64 [num_heads]."""
    num_heads, num_tiles, num_blocks = selection.blocks.shape
    entries = num_blocks + (0 if selection.columns is None else selection.columns.shape[1])
    size = max(1, _MAX_INDEX // (num_heads * entries))
    total = torch.zeros(num_heads, dtype=torch.float64, device=selection.blocks.device)
    for first in range(0, num_tiles, size):
        part = selection.part(first, min(first + size, num_tiles))
        total += build_index(part).keys_read().double().sum(1)
    return total


def causal_keys(tiles: Tiles) -> int:
    """Keys that dense attention loads for the rows, tile by tile."""
    end = tiles.position + tiles.num_rows
    return sum(min((tiles.first + tile + 1) * tiles.block_size, end) for tile in range(tiles.num_tiles))


class Reader:
    """Which keys a block of rows reads, and which of them each row sees."""

    def __init__(self, selection: Selection, num_keys: int) -> None:
        """Marks the single keys.

        Args:
            selection: The rows' keys.
            num_keys: Keys so far.
        """
        self._selection = selection
        self._columns = None
        if selection.columns is not None:
            marks = torch.zeros(len(selection.blocks), num_keys + 1, dtype=torch.bool, device=selection.blocks.device)
            self._columns = marks.scatter_(1, selection.columns.clamp(max=num_keys), True)

    def block(self, start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of the rows at positions [start, stop).

        Returns:
            Keys, ascending, [num_keys], and their visibility, bool [num_heads, num_rows, num_keys].
        """
        selection, size = self._selection, self._selection.tiles.block_size
        device = selection.blocks.device
        i = torch.arange(start, stop, device=device)
        tile = i // size - selection.tiles.first
        first, last = start // size - selection.tiles.first, (stop - 1) // size - selection.tiles.first
        blocks = selection.blocks[:, first : last + 1]
        some = blocks.any(1).any(0).repeat_interleave(size)[:stop]
        if self._columns is not None:
            some = some | self._columns[:, :stop].any(0)
        j = some.nonzero()[:, 0]
        visible = blocks[:, :, j // size][:, tile - first]
        if selection.band is not None:
            n_init, n_local = selection.band[:, 0, None, None], selection.band[:, 1, None, None]
            visible &= (j < n_init) | (i[:, None] - j < n_local)
        if self._columns is not None:
            visible |= self._columns[:, None, j]
        return j, visible & (j <= i[:, None])


def row_blocks(first: int, stop: int, num_heads: int) -> Iterator[tuple[int, int]]:
    """The positions [first, stop) in blocks whose scores against all keys before them fit."""
    while first < stop:
        size = max(1, min(BLOCK_ROWS, MAX_SCORES // (num_heads * stop)))
        yield first, min(first + size, stop)
        first += size


def attend_scores(scores: torch.Tensor, v: torch.Tensor, visible: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of heads that share a KV head, from their scores.

    Args:
        scores: fp32 [num_heads, num_rows, num_keys]; overwritten.
        v: [num_keys, head_size].
        visible: bool, broadcast to the scores; every row sees a key.

    Returns:
        Output, fp32 [num_heads, num_rows, head_size], and log-sum-exp, fp32 [num_heads, num_rows].
    """
    scores.masked_fill_(~visible, float("-inf"))
    lse = scores.logsumexp(-1)
    return scores.sub_(lse[..., None]).exp_() @ v.float(), lse


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    patterns: Sequence[DynamicPattern],
    *,
    num_sparse: int,
    chunk: int | None,
    rule: Rule,
    out: torch.Tensor,
) -> None:
    """A prompt's sparse rows, each head by its own pattern, into ``out``; other rows are left alone.

    Args:
        q: Queries of the prompt, [num_heads, prompt_len, head_size].
        k: Keys, [num_kv_heads, prompt_len, head_size].
        v: Values, like ``k``.
        patterns: One a query head.
        num_sparse: First rows that are sparse.
        chunk: Tokens of a chunk; None: the whole prompt at once.
        rule: How scores are made.
        out: Like ``q``.
    """
    group = len(q) // len(k)
    for head, pattern in enumerate(patterns):
        kv_head = head // group
        part_q, part_k = q[head, None], k[kv_head, None]
        for part in chunks(part_q, part_k, num_sparse=num_sparse, chunk=chunk, scale=rule.scale):
            reader = Reader(select((pattern,), part), part.num_keys)
            for start, stop in row_blocks(part.position, part.position + part.num_rows, 1):
                j, visible = reader.block(start, stop)
                scores = rule.scores(part_q[:, start:stop], k[kv_head, j])
                out[head, start:stop] = attend_scores(scores, v[kv_head, j], visible)[0][0].to(out.dtype)
