"""Contenders on CUDA that know no pages: they get contiguous keys and values, which serving would not have."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.problem import Problem, Settings


def cudnn_missing(settings: Settings) -> str | None:
    """Whether torch lacks cuDNN."""
    return None if torch.backends.cudnn.is_available() else "this torch has no cuDNN"


class CudnnSdpa:
    """Dense, by cuDNN through torch: the whole prompt in one call, as its causal mask starts at the first key."""

    def __init__(self, problem: Problem) -> None:
        self._scale = problem.settings.scale
        self._q, self._k, self._v = (x.transpose(0, 1)[None] for x in (problem.q, problem.k, problem.v))

    def plan(self) -> None:
        """Nothing to plan."""

    def run(self) -> list[torch.Tensor]:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = F.scaled_dot_product_attention(
                self._q,
                self._k,
                self._v,
                is_causal=True,
                scale=self._scale,
                enable_gqa=self._q.shape[1] != self._k.shape[1],
            )
        return [out[0].transpose(0, 1)]


class FlashAttnPackage:
    """Dense, by the flash-attn package, on contiguous keys and values; its causal mask ends at the last key."""

    def __init__(self, problem: Problem) -> None:
        # May be missing.
        from flash_attn import flash_attn_func

        self._attend: Any = flash_attn_func
        self._problem = problem

    def plan(self) -> None:
        """Nothing to plan."""

    def run(self) -> list[torch.Tensor]:
        problem = self._problem
        return [
            self._attend(
                problem.q[None, start:end],
                problem.k[None, :end],
                problem.v[None, :end],
                softmax_scale=problem.settings.scale,
                causal=True,
            )[0]
            for start, end in problem.chunks
        ]


class Xformers:
    """Dense, by xFormers, on contiguous keys and values; heads as [1, tokens, num_kv_heads, group, head_size]."""

    def __init__(self, problem: Problem) -> None:
        # May be missing.
        from xformers.ops import memory_efficient_attention_forward
        from xformers.ops.fmha.attn_bias import LowerTriangularFromBottomRightMask

        settings = problem.settings
        group = settings.num_heads // settings.num_kv_heads
        self._attend: Any = memory_efficient_attention_forward
        self._bias = LowerTriangularFromBottomRightMask()
        self._problem = problem
        self._q = problem.q.view(1, -1, settings.num_kv_heads, group, settings.head_size)
        self._k, self._v = (x[None, :, :, None].expand(-1, -1, -1, group, -1) for x in (problem.k, problem.v))

    def plan(self) -> None:
        """Nothing to plan."""

    def run(self) -> list[torch.Tensor]:
        return [
            self._attend(
                self._q[:, start:end],
                self._k[:, :end],
                self._v[:, :end],
                attn_bias=self._bias,
                scale=self._problem.settings.scale,
            )[0].flatten(1, 2)
            for start, end in self._problem.chunks
        ]
