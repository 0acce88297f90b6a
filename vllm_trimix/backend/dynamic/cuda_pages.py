"""Pages of a CUDA cache, as dynamic patterns read them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from vllm_trimix.backend.dynamic.layer_patterns import LayerPatterns
from vllm_trimix.backend.dynamic.pages import Pages, Sums
from vllm_trimix.kernels.layer_call import LayerCall
from vllm_trimix.kernels.sparse_index import Place, SparseIndex, idle_index


class GatheredKeys(NamedTuple):
    """Keys of some KV heads, [num_kv_heads, num_keys, head_size], dequantised; values stay in their pages."""

    k: torch.Tensor


@dataclass
class CudaPages(Pages):
    """Pages of a CUDA cache, read in place; keys are gathered for the choice alone.

    Attributes:
        call: The layer's tensors. The choice ignores the logit cap; keys are dequantised to the output's dtype.
        block_table: Page ids, [num_requests, max_blocks], int32.
        group: Query heads of a KV head.
        variants: Compiled before, by what the index lists; new ones are added.
    """

    call: LayerCall
    block_table: torch.Tensor
    group: int
    variants: dict[tuple[bool, bool], Any]

    def __post_init__(self) -> None:
        self.scale = self.call.scale

    @property
    def bytes_per_token(self) -> int:
        # Of fp8 keys both precisions for a moment.
        stored = 1 if self.call.k_cache.element_size() == 1 else 0
        return self.call.k_cache.shape[3] * (stored + self.call.out.dtype.itemsize)

    def gather(self, request: int, num_keys: int, first_head: int, num_heads: int) -> GatheredKeys:
        block_size = self.call.k_cache.shape[2]
        pages = self.block_table[request, : -(-num_keys // block_size)].long()
        k = self.call.k_cache[:, first_head : first_head + num_heads].transpose(0, 1)
        # Heads first already, so that nothing is copied twice; as bytes, because not every torch selects from fp8.
        stored = k.view(torch.uint8) if k.element_size() == 1 else k
        k = stored.index_select(1, pages).view(k.dtype)
        k = k.view(num_heads, -1, k.shape[3])[:, :num_keys]
        return GatheredKeys(dequantised(k, self.call.scales.k, self.call.out.dtype))

    def sums(self, request: int, num_keys: int, first_head: int, num_heads: int) -> Sums:
        # Triton may be missing.
        from vllm_trimix.kernels.triton_estimate import column_and_slash_sums

        return functools.partial(
            column_and_slash_sums,
            k_cache=self.call.k_cache,
            block_table=self.block_table,
            request=request,
            num_keys=num_keys,
            first_head=first_head * self.group,
            group=self.group,
            scale=self.scale,
            k_scale=self.call.scales.k,
        )

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        return dequantised(q, self.call.scales.q, self.call.out.dtype)

    def attend(
        self,
        q: torch.Tensor,
        gathered: GatheredKeys,
        index: SparseIndex,
        place: Place,
        out: torch.Tensor,
        keys_read: torch.Tensor,
    ) -> None:
        # Triton may be missing.
        from vllm_trimix.kernels.triton_sparse import sparse_prefill

        kind = (index.column_count is not None, index.band is not None)
        self.variants[kind] = sparse_prefill(
            self.call._replace(q=q, out=out),
            self.block_table,
            index,
            place,
            keys_read=keys_read,
            variant=self.variants.get(kind),
        )

    def warm_up(self, patterns: LayerPatterns, q: torch.Tensor, out: torch.Tensor) -> None:
        """Compiles what serving will launch for this layer, by launches that write nothing."""
        for has_columns, has_band in patterns.index_kinds():
            index = idle_index(patterns.block_size, q.device, has_columns=has_columns, has_band=has_band)
            gathered, keys_read = GatheredKeys(self.call.k_cache), index.block_count.new_empty(index.block_count.shape)
            self.attend(q, gathered, index, Place(0, 0, 0), out, keys_read)
        if patterns.last_rows:
            # One key, in the first request's first page: whatever it holds.
            sums = self.sums(0, 1, 0, 1)
            sums(self.queries(q[:1, : self.group]).transpose(0, 1).contiguous())


def dequantised(x: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    if x.element_size() > 1:
        return x
    x = x.to(dtype)
    return x if scale is None else x.mul_(scale.to(dtype))
