"""Attention over a sparse index in plain PyTorch: the CPU kernel where the compiled one is missing."""

from __future__ import annotations

import math

import torch

from vllm_trimix.kernels.sparse_index import SparseIndex


def sparse_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: SparseIndex,
    *,
    scale: float,
    out: torch.Tensor,
    keys_read: torch.Tensor | None = None,
) -> None:
    """Attention of one chunk's rows over the listed keys, into ``out``.

    Args:
        q: Queries of the index's rows, [num_rows, num_heads, head_size], bf16/fp16/fp32.
        k: All keys so far, [num_kv_heads, num_keys, head_size]; ``num_heads`` is a multiple of ``num_kv_heads``.
        v: Values, like ``k``.
        index: What each tile of each head reads.
        scale: Softmax scale.
        out: Output, shaped and typed like ``q``.
        keys_read: Keys loaded for each tile, int32 [num_heads, num_tiles], written; None to leave it.
    """
    tiles, group = index.tiles, q.shape[1] // k.shape[0]
    block = torch.arange(tiles.block_size, device=q.device)
    for head in range(q.shape[1]):
        keys, values = k[head // group], v[head // group]
        for tile in range(tiles.num_tiles):
            first = max(tiles.position, (tiles.first + tile) * tiles.block_size)
            end = min(tiles.position + tiles.num_rows, (tiles.first + tile + 1) * tiles.block_size)
            rows = slice(first - tiles.position, end - tiles.position)
            blocks = index.block_index[head, tile, : int(index.block_count[head, tile])]
            j = (blocks[:, None] * tiles.block_size + block).flatten()
            j = j[j < end]
            i = torch.arange(first, end, device=q.device)[:, None]
            visible = j <= i
            if index.band is not None:
                n_init, n_local = index.band[head].tolist()
                visible &= (j < n_init) | (i - j < n_local)
            if index.column_index is not None and index.column_count is not None:
                columns = index.column_index[head, tile, : int(index.column_count[head, tile])]
                j = torch.cat((columns, j))
                visible = torch.cat((visible.new_ones(end - first, len(columns)), visible), 1)
            if keys_read is not None:
                keys_read[head, tile] = len(j)
            scores = q[rows, head].float() @ keys[j].float().T * scale
            probs = torch.softmax(scores.masked_fill_(~visible, -math.inf), dim=-1)
            out[rows, head] = (probs.to(v.dtype) @ values[j]).to(out.dtype)
