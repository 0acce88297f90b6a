"""One layer's attention in one step, as every way to compute it on CUDA takes it; imports no Triton."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Scales(NamedTuple):
    """Dequantisation scales of a layer's fp8 tensors, one fp32 each on the device; None is 1."""

    q: torch.Tensor | None = None
    k: torch.Tensor | None = None
    v: torch.Tensor | None = None


class LayerCall(NamedTuple):
    """A layer's tensors and numbers; how the kernels read its pages is theirs to know.

    Attributes:
        q: Queries of the step, [num_tokens, num_heads, head_size], bf16/fp16/fp32/fp8_e4m3, last dim contiguous.
        k_cache: Keys, [num_pages, num_kv_heads, page_size, head_size], any strides with a contiguous last dim; the
            dtype of ``q``, or fp8 (e4m3 or e5m2).
        v_cache: Values, with the strides and dtype of ``k_cache``.
        out: Output, shape of ``q``, bf16/fp16/fp32, last dim contiguous; rows that aren't computed stay as they are.
        scale: Softmax scale, from the true head size.
        soft_cap: Logits become ``soft_cap * tanh(logit / soft_cap)``; 0 is off.
        scales: Of fp8 tensors.
    """

    q: torch.Tensor
    k_cache: torch.Tensor
    v_cache: torch.Tensor
    out: torch.Tensor
    scale: float
    soft_cap: float = 0.0
    scales: Scales = Scales()
