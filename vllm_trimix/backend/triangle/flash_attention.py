"""vLLM's FlashAttention over pseudo-requests, called as its FLASH_ATTN implementation calls it.

It takes what that implementation takes: fp16 and bf16, and with an fp8 (e4m3) cache queries in fp8 too. FlashAttention
2 and 3 are compiled ahead of time; 4 compiles at its first launch.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

from vllm_trimix.backend.triangle.prefill import LayerGroup
from vllm_trimix.kernels.layer_call import LayerCall, Scales


class FlashCall(NamedTuple):
    """One launch, without the layer's tensors.

    Attributes:
        rows: The step's rows, together all rows of the pseudo-requests.
        cu_seqlens_q: First row of each pseudo-request among ``rows``, and the end, [num_requests + 1], int32.
        max_seqlen_q: At least the rows of the longest.
        seqused_k: Keys of each, [num_requests], int32. Causal masks align the last row with the last key.
        max_seqlen_k: At least the keys of the longest.
        block_table: Pages of each, [num_requests, max_blocks], int32.
        causal: Whether rows see no later key.
        window_size: Keys that a row sees before and after its own; None is all.
    """

    rows: slice | torch.Tensor
    cu_seqlens_q: torch.Tensor
    max_seqlen_q: int
    seqused_k: torch.Tensor
    max_seqlen_k: int
    block_table: torch.Tensor
    causal: bool = True
    window_size: tuple[int, int] | None = None


class FlashLayer(NamedTuple):
    """What all launches of a layer share; pages as FlashAttention takes them, tokens outermost."""

    k: torch.Tensor
    v: torch.Tensor
    scale: float
    soft_cap: float
    scales: Scales
    version: int


def flash_attention_version(group: LayerGroup) -> int:
    """The version that vLLM picks on this GPU.

    Raises:
        RuntimeError: There is none.
    """
    # vLLM's compiled operators are heavy, and missing off CUDA.
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    (head_size,) = {shape.head_size for shape in group.shapes}
    version = get_flash_attn_version(head_size=head_size, kv_cache_block_size=group.block_size)
    if version is None:
        raise RuntimeError(f"vLLM has no FlashAttention for head_size {head_size} on this device")
    return version


def flash_layer(call: LayerCall, *, version: int) -> FlashLayer:
    """A layer from what ``TrianglePrefill.run`` gets; copies nothing."""
    k, v = (canonicalize_singleton_dim_strides(cache.transpose(1, 2)) for cache in (call.k_cache, call.v_cache))
    return FlashLayer(k, v, call.scale, call.soft_cap, call.scales, version)


def attend(call: FlashCall, layer: FlashLayer, q: torch.Tensor, *, out: torch.Tensor) -> None:
    """One launch: writes the call's rows of ``out``; ``q`` and ``out`` hold all rows of the step."""
    if isinstance(call.rows, slice):
        launch(call, layer, q[call.rows], out=out[call.rows])
    else:
        out.index_copy_(0, call.rows, launch(call, layer, take(q, call.rows))[0])


def launch(
    call: FlashCall, layer: FlashLayer, q: torch.Tensor, *, out: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """One launch over exactly the call's rows.

    Returns:
        The output, ``out`` or what FlashAttention allocates, and the log-sum-exp, [num_heads, num_rows], fp32, which
        FlashAttention 2 and 3 write in any case.
    """
    # vLLM's compiled operators are heavy, and missing off CUDA.
    from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

    shape = (call.seqused_k.shape[0], layer.k.shape[2])
    q_descale, k_descale, v_descale = (None if scale is None else scale.expand(shape) for scale in layer.scales)
    return flash_attn_varlen_func(
        q=q,
        k=layer.k,
        v=layer.v,
        out=out,
        cu_seqlens_q=call.cu_seqlens_q,
        max_seqlen_q=call.max_seqlen_q,
        seqused_k=call.seqused_k,
        max_seqlen_k=call.max_seqlen_k,
        softmax_scale=layer.scale,
        causal=call.causal,
        window_size=None if call.window_size is None else list(call.window_size),
        block_table=call.block_table,
        softcap=layer.soft_cap,
        return_softmax_lse=True,
        fa_version=layer.version,
        q_descale=q_descale,
        k_descale=k_descale,
        v_descale=v_descale,
        # Pseudo-requests have few keys each: splitting them gains nothing and costs fp32 copies of the output.
        num_splits=1,
    )


def take(q: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Some rows, gathered. FlashAttention takes rows without gaps only: this copy is the price of scattered spans."""
    # Bytes: not every device gathers fp8.
    stored = q.view(torch.uint8) if q.element_size() == 1 else q
    return stored.index_select(0, rows).view(q.dtype)
