"""The plain PyTorch definition of masked paged attention: the oracle of every kernel test."""

from __future__ import annotations

import torch


def gather_pages(cache: torch.Tensor, block_table_row: torch.Tensor, seq_len: int) -> torch.Tensor:
    """Reads the first ``seq_len`` tokens of one request from a paged cache.

    Args:
        cache: K or V view, [num_blocks, num_kv_heads, block_size, head_size].
        block_table_row: Page ids of the request, [max_blocks], integer.
        seq_len: Tokens to read.

    Returns:
        [seq_len, num_kv_heads, head_size], the cache's dtype.
    """
    block_size = cache.shape[2]
    pages = cache[block_table_row[: -(-seq_len // block_size)].long()]
    return pages.transpose(1, 2).reshape(-1, cache.shape[1], cache.shape[3])[:seq_len]


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """Softmax attention under an explicit mask, in the inputs' own precision.

    Args:
        q: Queries, [num_queries, num_heads, head_size].
        k: Keys, [num_keys, num_kv_heads, head_size]; ``num_heads`` is a multiple of ``num_kv_heads``.
        v: Values, shaped like ``k``.
        mask: Visibility, [num_queries, num_keys], boolean. Hidden keys may hold NaN.
        scale: Softmax scale.

    Returns:
        [num_queries, num_heads, head_size], ``q``'s dtype.
    """
    group = q.shape[1] // k.shape[1]
    used = mask.any(0)[:, None, None]
    k = torch.where(used, k, 0).repeat_interleave(group, dim=1)
    v = torch.where(used, v, 0).repeat_interleave(group, dim=1)
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    probs = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    return torch.einsum("hqk,khd->qhd", probs, v)
