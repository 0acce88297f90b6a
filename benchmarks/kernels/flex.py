"""FlexAttention under either pattern, with block masks computed from the pattern's edges, never from a full mask."""

from __future__ import annotations

import shutil
from typing import Any, Literal

import torch

from benchmarks.kernels.counting import dense_pattern
from benchmarks.kernels.problem import Problem, Settings
from vllm_trimix.patterns.triangle import Triangle

BLOCK = 128


def missing(settings: Settings) -> str | None:
    """FlexAttention compiles: on CPU to C++, on CUDA to Triton."""
    if settings.device.type == "cpu":
        return None if shutil.which("g++") or shutil.which("clang++") else "needs a C++ compiler on the PATH"
    return None


def visible_blocks(pattern: Triangle, length: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Which blocks of the mask are partly visible, and which wholly.

    Returns:
        Two boolean [blocks, blocks]: those that need the mask, and those that don't. Others hold no visible pair. A
        block that runs over the prompt's end always needs the mask.
    """
    first = torch.arange(0, length, BLOCK, device=device)
    last = (first + BLOCK - 1).clamp(max=length - 1)
    i_first, i_last, j_first, j_last = first[:, None], last[:, None], first[None], last[None]
    dense_from = length - pattern.last_n
    some = (j_first <= i_last) & (
        (j_first < pattern.n_init) | (i_first - j_last < pattern.n_local) | (i_last >= dense_from)
    )
    whole = (j_last <= i_first) & (
        (j_last < pattern.n_init) | (i_last - j_first < pattern.n_local) | (i_first >= dense_from)
    )
    inside = first + BLOCK <= length
    whole &= inside[:, None] & inside[None]
    return some & ~whole, whole


def make_block_mask(pattern: Triangle, length: int, device: torch.device) -> Any:
    """FlexAttention's ``BlockMask`` of the whole prompt; memory grows with the square of the number of blocks."""
    # Heavy: it brings torch's compiler.
    from torch.nn.attention.flex_attention import BlockMask

    n_init, n_local, dense_from = pattern.n_init, pattern.n_local, length - pattern.last_n

    def visible(b: Any, h: Any, i: Any, j: Any) -> Any:
        return (j <= i) & ((j < n_init) | (i - j < n_local) | (i >= dense_from))

    def causal(b: Any, h: Any, i: Any, j: Any) -> Any:
        return j <= i

    def ordered(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """How many blocks each row of blocks has, and which, those first."""
        first = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
        return blocks.sum(-1, dtype=torch.int32)[None, None], first.to(torch.int32)[None, None]

    some, whole = visible_blocks(pattern, length, device)
    return BlockMask.from_kv_blocks(
        *ordered(some),
        *ordered(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=causal if dense_from <= 0 else visible,
        seq_lengths=(length, length),
        compute_q_blocks=False,
    )


class Flex:
    """The whole prompt in one call, on contiguous keys and values; compiled for each length."""

    def __init__(self, problem: Problem, *, pattern: Literal["dense", "triangle"]) -> None:
        # Heavy: it brings torch's compiler.
        from torch.nn.attention.flex_attention import flex_attention

        # One compilation for each length and pattern, all of the same function.
        torch._dynamo.config.recompile_limit = max(64, torch._dynamo.config.recompile_limit)
        self._attend = torch.compile(flex_attention, dynamic=False)
        self._problem = problem
        self._pattern = dense_pattern(problem.length) if pattern == "dense" else problem.settings.pattern
        self._q, self._k, self._v = (x.transpose(0, 1).contiguous()[None] for x in (problem.q, problem.k, problem.v))
        self._mask: Any = None

    def plan(self) -> None:
        self._mask = make_block_mask(self._pattern, self._problem.length, self._q.device)

    def run(self) -> list[torch.Tensor]:
        out = self._attend(
            self._q,
            self._k,
            self._v,
            block_mask=self._mask,
            scale=self._problem.settings.scale,
            enable_gqa=self._q.shape[1] != self._k.shape[1],
        )
        return [out[0].transpose(0, 1)]
