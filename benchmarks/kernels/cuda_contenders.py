"""Contenders on CUDA that read the paged cache: what vLLM runs there, and ours."""

from __future__ import annotations

import contextlib
import importlib.util
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from benchmarks.kernels.problem import FP8, Problem, Settings, plan_steps
from vllm_trimix.backend.triangle import flash_pages
from vllm_trimix.backend.triangle.prefill import LayerGroup, LayerShape, TrianglePrefill
from vllm_trimix.backend.upload import upload
from vllm_trimix.kernels.layer_call import LayerCall, Scales
from vllm_trimix.kernels.triton_configs import TileConfig


def package_missing(settings: Settings, *, package: str) -> str | None:
    """Whether a Python package lacks."""
    return None if importlib.util.find_spec(package) else f"the package {package} is not installed"


def flash_attention_missing(settings: Settings, *, version: int) -> str | None:
    """Why vLLM's FlashAttention of this version can't run on this GPU with this cache."""
    try:
        # Only vLLM's CUDA build has it.
        from vllm.vllm_flash_attn import fa_version_unsupported_reason
    except ImportError as error:
        return f"this vLLM has no FlashAttention: {error}"
    if settings.fp8 and version != 3:
        return "fp8 pages need FlashAttention 3, on Hopper"
    return fa_version_unsupported_reason(version)


def flash_attention_version(settings: Settings) -> int:
    """The version that vLLM picks on this GPU."""
    # Only vLLM's CUDA build has it.
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

    version = get_flash_attn_version(head_size=settings.head_size, kv_cache_block_size=settings.block_size)
    return 2 if version is None else version


def flash_missing(settings: Settings) -> str | None:
    """Why vLLM's own FlashAttention can't run on this GPU with this cache."""
    return flash_attention_missing(settings, version=flash_attention_version(settings))


def triton_missing(settings: Settings) -> str | None:
    """Ours needs Triton, and vLLM's own FlashAttention for the last rows."""
    return package_missing(settings, package="triton") or flash_missing(settings)


class _FlashStep:
    """vLLM's FlashAttention on the last rows of one step, called as its FLASH_ATTN implementation does."""

    def __init__(self, problem: Problem, first_row: int, end: int, *, version: int) -> None:
        # Heavy, and only where FlashAttention runs.
        from vllm.utils.torch_utils import canonicalize_singleton_dim_strides

        settings = problem.settings
        self._settings, self._version = settings, version
        rows = slice(first_row, end)
        self._q = (problem.q if problem.q_fp8 is None else problem.q_fp8)[rows]
        self._out = problem.out[rows]
        self._k, self._v = (
            canonicalize_singleton_dim_strides(cache)
            for cache in problem.kv_cache.transpose(1, 2).split(settings.head_size, dim=-1)
        )
        self._block_table = problem.block_table
        self._num_rows, self._end = end - first_row, end
        device = settings.device
        self._cu_seqlens_q = torch.tensor([0, end - first_row], dtype=torch.int32, device=device)
        self._seqused_k = torch.tensor([end], dtype=torch.int32, device=device)
        # vLLM passes its unit scales to FlashAttention whatever the cache holds.
        self._descale = torch.ones(1, settings.num_kv_heads, device=device)
        self._schedule: torch.Tensor | None = None

    def plan(self) -> None:
        if self._version != 3:
            return
        # Only vLLM's CUDA build has it.
        from vllm.vllm_flash_attn import get_scheduler_metadata

        settings = self._settings
        self._schedule = get_scheduler_metadata(
            batch_size=1,
            max_seqlen_q=self._num_rows,
            max_seqlen_k=self._end,
            num_heads_q=settings.num_heads,
            num_heads_kv=settings.num_kv_heads,
            headdim=settings.head_size,
            cache_seqlens=self._seqused_k,
            qkv_dtype=self._q.dtype,
            cu_seqlens_q=self._cu_seqlens_q,
            page_size=settings.block_size,
            causal=True,
            window_size=(-1, -1),
            num_splits=0,
        )

    def run(self) -> None:
        # Only vLLM's CUDA build has it.
        from vllm.vllm_flash_attn import flash_attn_varlen_func

        flash_attn_varlen_func(
            q=self._q,
            k=self._k,
            v=self._v,
            out=self._out,
            cu_seqlens_q=self._cu_seqlens_q,
            max_seqlen_q=self._num_rows,
            seqused_k=self._seqused_k,
            max_seqlen_k=self._end,
            softmax_scale=self._settings.scale,
            causal=True,
            block_table=self._block_table,
            scheduler_metadata=self._schedule,
            fa_version=self._version,
            q_descale=self._descale if self._settings.fp8 else None,
            k_descale=self._descale if self._version != 2 else None,
            v_descale=self._descale if self._version != 2 else None,
            num_splits=0,
        )


class FlashAttention:
    """Dense, by vLLM's FlashAttention, paged."""

    def __init__(self, problem: Problem, *, version: int) -> None:
        self._steps = [_FlashStep(problem, start, end, version=version) for start, end in problem.chunks]
        self._out = [problem.out[start:end] for start, end in problem.chunks]

    def plan(self) -> None:
        for step in self._steps:
            step.plan()

    def run(self) -> list[torch.Tensor]:
        for step in self._steps:
            step.run()
        return self._out


class FlashInfer:
    """Dense, by FlashInfer's paged wrapper: one for each step, with one workspace, as the steps follow each other.

    An fp8 cache is read with queries in ``dtype``.
    """

    def __init__(self, problem: Problem) -> None:
        # May be missing.
        from flashinfer import BatchPrefillWithPagedKVCacheWrapper
        from vllm import envs

        self._problem = problem
        workspace = torch.zeros(
            envs.VLLM_FLASHINFER_WORKSPACE_BUFFER_SIZE, dtype=torch.uint8, device=problem.settings.device
        )
        self._wrappers: list[Any] = [
            BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD", backend="auto") for _ in problem.chunks
        ]
        self._kv = problem.kv_cache.transpose(1, 2).split(problem.settings.head_size, dim=-1)
        self._out = [problem.out[start:end] for start, end in problem.chunks]

    def plan(self) -> None:
        settings, table = self._problem.settings, self._problem.block_table
        for wrapper, (start, end) in zip(self._wrappers, self._problem.chunks, strict=True):
            pages = -(-end // settings.block_size)
            wrapper.plan(
                qo_indptr=torch.tensor([0, end - start], dtype=torch.int32),
                paged_kv_indptr=torch.tensor([0, pages], dtype=torch.int32),
                paged_kv_indices=table[0, :pages].contiguous(),
                paged_kv_last_page_len=torch.tensor([end - (pages - 1) * settings.block_size], dtype=torch.int32),
                num_qo_heads=settings.num_heads,
                num_kv_heads=settings.num_kv_heads,
                head_dim_qk=settings.head_size,
                page_size=settings.block_size,
                causal=True,
                sm_scale=settings.scale,
                q_data_type=settings.dtype,
                kv_data_type=FP8 if settings.fp8 else settings.dtype,
            )

    def run(self) -> list[torch.Tensor]:
        for wrapper, (start, end), out in zip(self._wrappers, self._problem.chunks, self._out, strict=True):
            wrapper.run(self._problem.q[start:end], self._kv, out=out)
        return self._out


def tile_missing(settings: Settings, *, head_sizes: range) -> str | None:
    """Other launch shapes are for one entry of the table."""
    if settings.head_size not in head_sizes or settings.dtype.itemsize != 2 or settings.fp8:
        return f"a launch shape for 16-bit caches and head sizes {head_sizes[0]} to {head_sizes[-1]}"
    if torch.cuda.get_device_capability(settings.device)[0] != 9:
        return "a launch shape for Hopper"
    return triton_missing(settings)


def launch_shape(tile: TileConfig | None) -> Any:
    """The kernel's launch shape while the context lasts, instead of its table's; ``block_m`` must stay the table's."""
    # Triton may be missing.
    from vllm_trimix.kernels import triton_triangle

    if tile is None:
        return contextlib.nullcontext()
    return mock.patch.object(triton_triangle, "config_for", return_value=tile)


@dataclass(frozen=True)
class PagesMask:
    """What a prompt's rows see through ``FlashPagesPrefill``: the triangle rounded to pages, last rows everything."""

    settings: Settings

    def mask(self, q_positions: torch.Tensor, k_positions: torch.Tensor, prompt_len: int) -> torch.Tensor:
        pattern = self.settings.pattern
        rounded = flash_pages.visible(
            q_positions,
            k_positions,
            n_init=pattern.n_init,
            n_local=pattern.n_local,
            block_size=self.settings.block_size,
        )
        return rounded | pattern.mask(q_positions, k_positions, prompt_len)


class Trimix:
    """Triangle, as the backend runs a layer: the way of prefill takes its share of the plan, vLLM's kernel the rest."""

    def __init__(
        self,
        problem: Problem,
        *,
        prefill: type[TrianglePrefill],
        max_tail_rows: int | None = None,
        tile: TileConfig | None = None,
    ) -> None:
        settings = problem.settings
        self._tile = tile
        self._problem = problem
        self._version = flash_attention_version(settings)
        group = LayerGroup(
            frozenset({LayerShape(settings.num_heads, settings.num_kv_heads, settings.head_size)}),
            triangle=settings.pattern,
            dtype_size=settings.dtype.itemsize,
            block_size=settings.block_size,
            device=settings.device,
        )
        self._prefill = prefill(group)
        self._max_tail_rows = self._prefill.max_tail_rows if max_tail_rows is None else max_tail_rows
        self._k, self._v = problem.kv_cache.split(settings.head_size, dim=-1)
        one = torch.ones(1, device=settings.device) if settings.fp8 else None
        self._scales = Scales(one, one, one)
        self._q = problem.q if problem.q_fp8 is None else problem.q_fp8
        self._out = [problem.out[start:end] for start, end in problem.chunks]
        self._steps: list[Any] = []
        self._dense: list[list[_FlashStep]] = []

    def plan(self) -> None:
        problem, device = self._problem, self._q.device
        plans = plan_steps(problem, max_tail_rows=self._max_tail_rows)
        self._steps = [
            self._prefill.bind(plan, upload(self._prefill.arrays(plan), device), problem.block_table)
            if plan.triangle or plan.tails
            else None
            for plan in plans
        ]
        # A dense span ends where its step ends, and positions of a single prompt are its rows.
        self._dense = [
            [
                _FlashStep(problem, span.position, span.position + span.num_rows, version=self._version)
                for span in plan.dense
            ]
            for plan in plans
        ]
        for steps in self._dense:
            for step in steps:
                step.plan()

    def run(self) -> list[torch.Tensor]:
        scale = self._problem.settings.scale
        chunks = zip(self._problem.chunks, self._out, self._steps, self._dense, strict=True)
        with launch_shape(self._tile):
            for (start, end), out, step, dense in chunks:
                for rows in dense:
                    rows.run()
                if step is not None:
                    call = LayerCall(self._q[start:end], self._k, self._v, out, scale, scales=self._scales)
                    self._prefill.run(step, call)
        return self._out
