"""What dynamic patterns measure of a chunk before they choose: attention sums of its last rows, and block means."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

# fp32 scores, or fp32 copies of keys, held at once, whatever the length of the prompt: 64 MiB.
MAX_SCORES = 2**24


def column_and_slash_sums(
    q_last: torch.Tensor, k: torch.Tensor, scale: float, *, max_scores: int = MAX_SCORES
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the last rows' attention, softmax(q k^T), by key and by distance.

    Memory is linear in the keys: with more than ``max_scores`` scores the keys are walked twice, in parts.

    Args:
        q_last: The last rows of the keys, [num_heads, num_last, head_size].
        k: Keys, [num_kv_heads, num_keys, head_size].
        scale: Softmax scale.
        max_scores: Scores held at once.

    Returns:
        Column sums [num_heads, num_keys], of key j, and slash sums [num_heads, num_keys], of distance i - j; fp32.
    """
    num_heads, num_last, _ = q_last.shape
    num_kv_heads, num_keys, _ = k.shape
    columns = torch.empty(num_heads, num_keys, device=k.device)
    # By key less row: the largest distance first, future keys last.
    diagonals = torch.zeros(num_heads, num_keys + num_last - 1, device=k.device)
    group = num_heads // num_kv_heads
    at_once = max(1, max_scores // (group * num_last * num_keys))
    for first in range(0, num_kv_heads, at_once):
        heads = slice(first * group, (first + at_once) * group)
        for start, probs in _probabilities(q_last[heads], k[first : first + at_once], scale, max_scores):
            stop = start + probs.shape[2]
            columns[heads, start:stop] = probs.sum(1)
            for row in range(num_last):
                shift = num_last - 1 - row
                diagonals[heads, start + shift : stop + shift] += probs[:, row]
    return columns, diagonals[:, :num_keys].flip(1)


def _probabilities(
    q_last: torch.Tensor, k: torch.Tensor, scale: float, max_scores: int
) -> Iterator[tuple[int, torch.Tensor]]:
    """Parts of the attention of the last rows: first key, and [num_heads, num_last, part]."""
    num_rows, num_keys = q_last.shape[0] * q_last.shape[1], k.shape[1]
    part = max(1, max_scores // num_rows)
    if part >= num_keys:
        yield 0, torch.softmax(_scores(q_last, k, scale, 0, num_keys), dim=-1)
        return
    lse = torch.full(q_last.shape[:2], -math.inf, device=k.device)
    for start in range(0, num_keys, part):
        scores = _scores(q_last, k, scale, start, min(start + part, num_keys))
        lse = torch.logaddexp(lse, scores.logsumexp(-1))
    for start in range(0, num_keys, part):
        scores = _scores(q_last, k, scale, start, min(start + part, num_keys))
        yield start, scores.sub_(lse[..., None]).exp_()


def _scores(q_last: torch.Tensor, k: torch.Tensor, scale: float, start: int, stop: int) -> torch.Tensor:
    """Scores of the last rows, fp32 [num_heads, num_last, stop - start]; -inf for future keys."""
    num_heads, num_last, head_size = q_last.shape
    num_kv_heads, num_keys, _ = k.shape
    q = q_last.reshape(num_kv_heads, -1, head_size).float() * scale
    scores = torch.bmm(q, k[:, start:stop].float().transpose(1, 2)).view(num_heads, num_last, -1)
    first = num_keys - num_last
    if stop > first:
        rows = torch.arange(first, num_keys, device=k.device)[:, None]
        scores.masked_fill_(torch.arange(start, stop, device=k.device) > rows, -math.inf)
    return scores


def block_means(x: torch.Tensor, block_size: int, *, offset: int = 0) -> torch.Tensor:
    """Means over blocks of tokens, fp32 [num_heads, num_blocks, head_size].

    Args:
        x: [num_heads, num_tokens, head_size].
        block_size: Tokens of a block.
        offset: Tokens of the first block that lie before ``x`` and don't count.
    """
    num_heads, num_tokens, head_size = x.shape
    num_blocks = -(-(offset + num_tokens) // block_size)
    means = torch.empty(num_heads, num_blocks, head_size, device=x.device)
    # Some heads at a time: on CPUs a sum in fp32 copies what it sums.
    at_once = max(1, MAX_SCORES // (num_tokens * head_size))
    for first in range(0, num_heads, at_once):
        _block_means(x[first : first + at_once], block_size, offset, means[first : first + at_once])
    return means


def _block_means(x: torch.Tensor, block_size: int, offset: int, out: torch.Tensor) -> None:
    """Whole blocks, between a first and a last that ``x`` may hold a part of."""
    num_tokens = x.shape[1]
    first = min(num_tokens, -offset % block_size)
    whole = (num_tokens - first) // block_size
    end = first + whole * block_size
    if first:
        out[:, 0] = x[:, :first].mean(1, dtype=torch.float32)
    if whole:
        blocks = x[:, first:end].unflatten(1, (whole, block_size))
        torch.mean(blocks, 2, dtype=torch.float32, out=out[:, bool(first) :][:, :whole])
    if end < num_tokens:
        out[:, -1] = x[:, end:].mean(1, dtype=torch.float32)


def pooled_scores(q_means: torch.Tensor, k_means: torch.Tensor, scale: float, causal: torch.Tensor) -> torch.Tensor:
    """Scores of block means, -inf where not ``causal``: fp32 [num_heads, num_tiles, num_blocks].

    Args:
        q_means: [num_heads, num_tiles, head_size].
        k_means: [num_kv_heads, num_blocks, head_size].
        scale: Softmax scale.
        causal: bool [num_tiles, num_blocks].
    """
    num_heads, num_tiles, head_size = q_means.shape
    q = q_means.reshape(len(k_means), -1, head_size) * scale
    scores = torch.bmm(q, k_means.transpose(1, 2)).view(num_heads, num_tiles, -1)
    return scores.masked_fill_(~causal, -math.inf)


def slash_blocks(slashes: torch.Tensor, tiles_minus_blocks: torch.Tensor, block_size: int) -> torch.Tensor:
    """Blocks that some selected diagonal crosses.

    Args:
        slashes: Selected distances i - j, bool [num_heads, num_keys].
        tiles_minus_blocks: Number of each tile less that of each block, [num_tiles, num_blocks].
        block_size: Rows of a tile and keys of a block; a whole tile counts, though the chunk may hold a part of it.

    Returns:
        bool [num_heads, num_tiles, num_blocks].
    """
    num_heads, num_keys = slashes.shape
    whole = F.pad(slashes, (0, -num_keys % block_size)).view(num_heads, -1, block_size)
    # A tile d blocks after a block holds the distances from (d - 1) * block_size + 1 to (d + 1) * block_size - 1.
    crossed = whole.any(2)
    crossed[:, 1:] |= whole[:, :-1, 1:].any(2)
    behind = tiles_minus_blocks.clamp(0, crossed.shape[1] - 1)
    return crossed[:, behind] & (tiles_minus_blocks >= 0)


def kept_columns(ranked: torch.Tensor, counts: torch.Tensor, everything: int) -> torch.Tensor:
    """The first ``counts`` of each head's ranked columns, ascending; ``everything`` in the other places.

    Args:
        ranked: Column numbers, best first, [num_heads, max_columns], int64.
        counts: Columns to keep, [num_heads], integer.
        everything: What sorts behind every column.
    """
    rank = torch.arange(ranked.shape[1], device=ranked.device)
    return torch.where(rank < counts[:, None], ranked, everything).sort(dim=1).values
