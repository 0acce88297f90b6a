"""Contenders on CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from benchmarks.kernels.problem import Problem, plan_steps, split_cpu_cache
from vllm_trimix.backend.cpu_layouts import probe_layouts
from vllm_trimix.kernels import torch_cpu
from vllm_trimix.plan import Span


class _VllmStep:
    """vLLM's paged CPU kernel on the last rows of one step, called as its CPU_ATTN implementation does."""

    def __init__(self, problem: Problem, first_row: int, end: int) -> None:
        self._problem = problem
        self._rows = slice(first_row, end)
        self._query_start_loc = torch.tensor([0, end - first_row], dtype=torch.int32)
        self._seq_lens = torch.tensor([end], dtype=torch.int32)
        self._key_cache, self._value_cache = split_cpu_cache(problem.kv_cache)
        self._schedule: torch.Tensor | None = None

    def plan(self) -> None:
        # vLLM is another build, or missing, where this does not run.
        from vllm import _custom_ops as ops
        from vllm import envs

        settings = self._problem.settings
        self._schedule = ops.cpu_attn_get_scheduler_metadata(
            num_reqs=1,
            num_heads=settings.num_heads,
            num_kv_heads=settings.num_kv_heads,
            head_dim=settings.head_size,
            seq_lens=self._seq_lens,
            dtype=settings.dtype,
            query_start_loc=self._query_start_loc,
            causal=True,
            sliding_window_size=-1,
            isa=self._problem.isa,
            enable_kv_split=envs.VLLM_CPU_ATTN_SPLIT_KV,
        )

    def run(self) -> None:
        # Only the CPU build has these ops.
        from vllm import _custom_ops as ops

        assert self._schedule is not None
        ops.cpu_attention_with_kv_cache(
            query=self._problem.q[self._rows],
            key_cache=self._key_cache,
            value_cache=self._value_cache,
            output=self._problem.out[self._rows],
            query_start_loc=self._query_start_loc,
            seq_lens=self._seq_lens,
            scale=self._problem.settings.scale,
            causal=True,
            alibi_slopes=None,
            sliding_window=-1,
            block_table=self._problem.block_table,
            softcap=0,
            scheduler_metadata=self._schedule,
            s_aux=None,
        )


class VllmCpu:
    """Dense, by vLLM."""

    def __init__(self, problem: Problem) -> None:
        self._steps = [_VllmStep(problem, start, end) for start, end in problem.chunks]
        self._out = [problem.out[start:end] for start, end in problem.chunks]

    def plan(self) -> None:
        for step in self._steps:
            step.plan()

    def run(self) -> list[torch.Tensor]:
        for step in self._steps:
            step.run()
        return self._out


class TorchSdpa:
    """Dense, by torch, on contiguous keys and values, with an explicit mask: torch's causal flag knows no offset."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._q, self._k, self._v = (x.transpose(0, 1).contiguous()[None] for x in (problem.q, problem.k, problem.v))

    def plan(self) -> None:
        """Nothing to plan: the masks of all steps together would be half of N x N."""

    def run(self) -> list[torch.Tensor]:
        outputs = []
        for start, end in self._problem.chunks:
            out = F.scaled_dot_product_attention(
                self._q[:, :, start:end],
                self._k[:, :, :end],
                self._v[:, :, :end],
                attn_mask=torch.arange(end)[None] <= torch.arange(start, end)[:, None],
                scale=self._problem.settings.scale,
                enable_gqa=True,
            )
            outputs.append(out[0].transpose(0, 1))
        return outputs


class TrimixCpu:
    """Triangle, as the backend runs a layer: the plan's triangle rows by our kernel, its dense rows by vLLM's."""

    def __init__(self, problem: Problem, *, sdpa_tiles: bool = False) -> None:
        self._problem = problem
        settings = problem.settings
        pages = problem.kv_cache.view(len(problem.kv_cache), settings.num_kv_heads, 2, -1)
        self._k_pages, self._v_pages = pages[:, :, 0], pages[:, :, 1]
        self._k_layout, self._v_layout = probe_layouts(
            block_size=settings.block_size,
            num_kv_heads=settings.num_kv_heads,
            head_size=settings.head_size,
            dtype=settings.dtype,
            isa=problem.isa,
        )
        self._attend = torch_cpu.attend_sdpa if sdpa_tiles else None
        self._out = [problem.out[start:end] for start, end in problem.chunks]
        self._spans: list[list[Span]] = []
        self._dense: list[list[_VllmStep]] = []

    def plan(self) -> None:
        problem = self._problem
        plans = plan_steps(problem)
        self._spans = [plan.triangle for plan in plans]
        # A dense span ends where its step ends, and positions of a single prompt are its rows.
        self._dense = [
            [_VllmStep(problem, span.position, span.position + span.num_rows) for span in plan.dense] for plan in plans
        ]
        for steps in self._dense:
            for step in steps:
                step.plan()

    def run(self) -> list[torch.Tensor]:
        problem, pattern = self._problem, self._problem.settings.pattern
        for (start, end), spans, dense in zip(problem.chunks, self._spans, self._dense, strict=True):
            for step in dense:
                step.run()
            torch_cpu.triangle_prefill(
                problem.q[start:end],
                self._k_pages,
                self._v_pages,
                problem.block_table,
                spans,
                k_layout=self._k_layout,
                v_layout=self._v_layout,
                block_size=problem.settings.block_size,
                n_init=pattern.n_init,
                n_local=pattern.n_local,
                scale=problem.settings.scale,
                out=problem.out[start:end],
                attend=self._attend,
            )
        return self._out
