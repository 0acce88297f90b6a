"""Pages of vLLM's CPU cache, unpacked for the sparse kernels."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_trimix.backend.dynamic.pages import Pages
from vllm_trimix.kernels import cpp_sparse, torch_sparse
from vllm_trimix.kernels.sparse_index import Place, SparseIndex
from vllm_trimix.kernels.torch_cpu import PageLayout


class DenseTokens(NamedTuple):
    """Keys and values of some KV heads, [num_kv_heads, num_keys, head_size]."""

    k: torch.Tensor
    v: torch.Tensor


@dataclass
class CpuPages(Pages):
    """Pages of vLLM's CPU cache, unpacked for the kernels here.

    Attributes:
        k_pages: As stored, [num_blocks, num_kv_heads, block_size * head_size].
        v_pages: Likewise.
        block_table: Page ids, [num_requests, max_blocks], int32.
        layouts: How a K page and a V page store their tokens.
        block_size: Tokens of a page.
        scale: Softmax scale.
    """

    k_pages: torch.Tensor
    v_pages: torch.Tensor
    block_table: torch.Tensor
    layouts: tuple[PageLayout, PageLayout]
    block_size: int
    scale: float

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.layouts[0].head_size * self.k_pages.element_size()

    def gather(self, request: int, num_keys: int, first_head: int, num_heads: int) -> DenseTokens:
        pages = self.block_table[request, : -(-num_keys // self.block_size)].long()
        gathered = []
        for cache, layout in zip((self.k_pages, self.v_pages), self.layouts, strict=True):
            tokens = torch.empty(num_heads, len(pages) * self.block_size, layout.head_size, dtype=cache.dtype)
            # Head by head: what is copied on the way is never more than a head's.
            for head in range(num_heads):
                tokens[head] = layout.tokens(cache[:, first_head + head, None][pages])[0]
            gathered.append(tokens[:, :num_keys])
        return DenseTokens(*gathered)

    def attend(
        self,
        q: torch.Tensor,
        gathered: DenseTokens,
        index: SparseIndex,
        place: Place,
        out: torch.Tensor,
        keys_read: torch.Tensor,
    ) -> None:
        num_heads = index.block_count.shape[0]
        rows = slice(place.first_row, place.first_row + index.tiles.num_rows)
        heads = slice(place.first_head, place.first_head + num_heads)
        kernel = cpu_kernel()
        kernel(q[rows, heads], *gathered, index, scale=self.scale, out=out[rows, heads], keys_read=keys_read)


@functools.cache
def cpu_kernel() -> Any:
    """The compiled kernel, or the PyTorch one where it was not built."""
    return cpp_sparse.sparse_prefill if cpp_sparse.is_available() else torch_sparse.sparse_prefill
