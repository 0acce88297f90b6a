"""vLLM's FlashAttention and its merge in plain PyTorch, strict about what the CUDA kernels take.

What a kernel would read or leave wrong silently is an assertion here; a row without keys is NaN.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch

from vllm_trimix.kernels.reference import gather_pages

_FP8 = (torch.float8_e4m3fn,)


class FlashOnCpu:
    """Stands in for ``flash_attn_varlen_func`` and ``merge_attn_states``; remembers its calls' arguments."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.merges = 0

    def flash_attn_varlen_func(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        max_seqlen_q: int,
        cu_seqlens_q: torch.Tensor,
        max_seqlen_k: int,
        *,
        seqused_k: torch.Tensor,
        block_table: torch.Tensor,
        softmax_scale: float,
        causal: bool = False,
        window_size: list[int] | None = None,
        softcap: float = 0.0,
        return_softmax_lse: bool = False,
        out: torch.Tensor | None = None,
        scheduler_metadata: torch.Tensor | None = None,
        q_descale: torch.Tensor | None = None,
        k_descale: torch.Tensor | None = None,
        v_descale: torch.Tensor | None = None,
        num_splits: int = 0,
        fa_version: int = 2,
    ) -> Any:
        self.calls.append({"q": q, "out": out, "causal": causal, "window_size": window_size, "version": fa_version})
        num_requests, num_kv_heads = len(seqused_k), k.shape[2]
        for tensor in (cu_seqlens_q, seqused_k, block_table):
            assert tensor.dtype == torch.int32
            assert tensor.stride(-1) == 1
        assert all(tensor.stride(-1) == 1 for tensor in (q, k, v))
        # FA2 swaps rows and heads when no request has two rows, and then takes rows for requests.
        assert cu_seqlens_q[0] == 0
        assert cu_seqlens_q[-1] == len(q)
        assert len(cu_seqlens_q) == num_requests + 1 == len(block_table) + 1
        assert (cu_seqlens_q.diff() > 0).all()
        assert (seqused_k > 0).all()
        assert int(cu_seqlens_q.diff().max()) <= max_seqlen_q
        assert int(seqused_k.max()) <= max_seqlen_k
        assert block_table.shape[1] * k.shape[1] >= int(seqused_k.max())
        assert k.dtype == v.dtype == q.dtype
        assert num_splits in (0, 1)
        for descale in (q_descale, k_descale, v_descale):
            assert descale is None or (descale.shape == (num_requests, num_kv_heads) and descale.dtype == torch.float32)
        out_dtype = torch.bfloat16 if q.dtype in _FP8 else q.dtype
        if out is None:
            out = torch.full(q.shape, math.nan, dtype=out_dtype)
        assert (out.shape, out.dtype) == (q.shape, out_dtype)
        lse = torch.full((q.shape[1], len(q)), math.nan)
        left, right = (-1, -1) if window_size is None else window_size
        if causal:
            right = 0
        starts = cu_seqlens_q.tolist()
        for index, seq_len in enumerate(seqused_k.tolist()):
            rows = slice(starts[index], starts[index + 1])
            keys, values = (
                _dequantise(gather_pages(cache.transpose(1, 2), block_table[index], seq_len), descale, index)
                for cache, descale in ((k, k_descale), (v, v_descale))
            )
            queries = _dequantise(q[rows], q_descale, index)
            num_rows = len(queries)
            i, j = torch.arange(seq_len - num_rows, seq_len)[:, None], torch.arange(seq_len)
            mask = torch.ones(num_rows, seq_len, dtype=torch.bool)
            if left >= 0:
                mask &= j >= i - left
            if right >= 0:
                mask &= j <= i + right
            part, lse[:, rows] = _attention(
                queries, keys, values, mask, scale=softmax_scale, softcap=softcap, dtype=out_dtype
            )
            out[rows] = part
        return (out, lse) if return_softmax_lse else out

    def merge_attn_states(
        self,
        output: torch.Tensor,
        prefix_output: torch.Tensor,
        prefix_lse: torch.Tensor,
        suffix_output: torch.Tensor,
        suffix_lse: torch.Tensor,
    ) -> None:
        """The kernel knows head strides only, those of both inputs being one: a token is all its heads."""
        self.merges += 1
        for tensor in (output, prefix_output, suffix_output):
            assert tensor.shape == output.shape
            assert tensor.dtype == output.dtype
            assert tensor.stride(2) == 1
            assert tensor.stride(0) == tensor.shape[1] * tensor.stride(1) or len(tensor) == 1
        assert prefix_output.stride(1) == suffix_output.stride(1)
        for lse in (prefix_lse, suffix_lse):
            assert lse.dtype == torch.float32
            assert lse.shape == output.shape[1::-1]
            assert lse.is_contiguous()
        share = torch.sigmoid(prefix_lse.double() - suffix_lse.double()).T[..., None].float()
        output.copy_(prefix_output.float() * share + suffix_output.float() * (1 - share))


@contextmanager
def flash_on_cpu(*, version: int | None = 3) -> Iterator[FlashOnCpu]:
    """Replaces vLLM's functions, where this package and the benchmarks look them up."""
    from vllm.v1.attention.backends import fa_utils
    from vllm.v1.attention.ops import merge_attn_states

    stand_in = FlashOnCpu()
    # vLLM's own does not import without its compiled kernels.
    package = ModuleType("vllm.vllm_flash_attn")
    package.flash_attn_varlen_func = stand_in.flash_attn_varlen_func  # type: ignore[attr-defined]
    package.get_scheduler_metadata = lambda **_: None  # type: ignore[attr-defined]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, package.__name__, package)
        patch.setattr(fa_utils, "flash_attn_varlen_func", stand_in.flash_attn_varlen_func, raising=False)
        patch.setattr(fa_utils, "get_flash_attn_version", lambda **_: version)
        patch.setattr(merge_attn_states, "merge_attn_states", stand_in.merge_attn_states)
        yield stand_in


def _dequantise(x: torch.Tensor, descale: torch.Tensor | None, index: int) -> torch.Tensor:
    """[tokens, heads, head_size] in fp32, by the scale of each KV head of request ``index``."""
    # FlashAttention scales fp8 only, and vLLM passes its unit scales in any case.
    if descale is None or x.dtype not in _FP8:
        return x.float()
    factors = descale[index].repeat_interleave(x.shape[1] // descale.shape[1])
    return x.float() * factors[None, :, None]


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    *,
    scale: float,
    softcap: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact scores, unnormalised probabilities in the low precision, as the kernels multiply them."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("qhd,khd->hqk", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~mask, -math.inf)
    largest = scores.amax(-1, keepdim=True)
    probs = torch.exp(scores - largest)
    total = probs.sum(-1, keepdim=True)
    # Keys that are read but hidden multiply by zero, so that NaN among them shows.
    out = torch.einsum("hqk,khd->qhd", probs.to(dtype).float(), v) / total.transpose(0, 1)
    return out.to(dtype), (largest + total.log())[..., 0]
