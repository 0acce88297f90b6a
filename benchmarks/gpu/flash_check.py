"""The kernel beside vLLM's FlashAttention, on the rows of a failing case that FlashAttention can compute as well."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from benchmarks.gpu.differences import budget_of, wrong_of
from benchmarks.gpu.kernel_cases import prepare_launch
from tests.kernels.answer import Part
from tests.kernels.sparse_interpreter import SparseCase
from tests.kernels.triton_interpreter import Case


def flash_beside_kernel(case: Any, device: str) -> dict[str, Any]:
    """Both on one case of which FlashAttention can compute all rows: a window without sinks, or dense rows.

    Returns:
        ``compared`` says what; ``kernel`` and ``flash`` have each one's values over the budget; ``skipped`` says why
        there is nothing to compare.
    """
    if device == "cpu":
        return {"skipped": "FlashAttention needs CUDA"}
    found = _comparable(case)
    if isinstance(found, str):
        return {"skipped": found}
    try:
        # May be missing.
        from vllm.vllm_flash_attn import flash_attn_varlen_func, is_fa_version_supported
    except ImportError as error:
        return {"skipped": f"vLLM's FlashAttention can't be imported: {error}"}
    version = 3 if is_fa_version_supported(3) else 2
    launch = prepare_launch(found, device)
    launch.run()
    parts = launch.answer().parts
    spans = _triangle_spans(launch) if isinstance(found, Case) else _sparse_spans(launch)
    # FlashAttention loads whole tiles of keys, and a weight of zero times NaN is NaN.
    keys, values = (launch.arguments[name].nan_to_num().transpose(1, 2).contiguous() for name in ("k_cache", "v_cache"))
    wrong = 0
    for part, (table_row, calls) in zip(parts, spans, strict=True):
        got = [
            flash_attn_varlen_func(
                q=q.contiguous(),
                k=keys,
                v=values,
                cu_seqlens_q=torch.tensor([0, len(q)], dtype=torch.int32, device=device),
                max_seqlen_q=len(q),
                seqused_k=torch.tensor([end], dtype=torch.int32, device=device),
                max_seqlen_k=end,
                softmax_scale=launch.arguments["scale"],
                causal=True,
                window_size=list(window),
                block_table=launch.arguments["block_table"][table_row : table_row + 1].contiguous(),
                softcap=launch.arguments["soft_cap"],
                fa_version=version,
            )
            for q, end, window in calls
        ]
        wrong += _wrong(replace(part, got=torch.cat(got).cpu()))
    return {
        "compared": f"{found!r}, FlashAttention {version}",
        "kernel": sum(map(_wrong, parts)),
        "flash": wrong,
    }


def _comparable(case: Any) -> Any:
    """The nearest case that FlashAttention computes too, or why there is none."""
    if isinstance(case, Case | SparseCase):
        if case.q_dtype not in ("bfloat16", "float16") or case.cache_dtype not in ("", case.q_dtype):
            return "FlashAttention's fp8 rounds differently, and it has no fp32"
        if case.huge:
            return "its tensors fill the device"
    if isinstance(case, Case):
        return replace(case, n_init=0)
    if isinstance(case, SparseCase):
        return replace(case, density=1.0, num_columns=0, columns=(), blocks=(), band=(), slab=None)
    return "FlashAttention gives no sums of probabilities"


Call = tuple[torch.Tensor, int, tuple[int, int]]
"""Queries of a FlashAttention call, the keys before and at its last row, and its window."""


def _triangle_spans(launch: Any) -> list[tuple[int, list[Call]]]:
    """Of each span: its row of the block table, and its calls."""
    case, q = launch.case, launch.arguments["q"]
    found = []
    for index, (table_row, first_row) in enumerate(launch.places()):
        position, rows = case.spans[index]
        body = case.body(index)
        calls: list[Call] = []
        if body:
            calls.append((q[first_row : first_row + body], position + body, (min(case.n_local, 2**20) - 1, 0)))
        if body < rows:
            calls.append((q[first_row + body : first_row + rows], position + rows, (-1, -1)))
        found.append((table_row, calls))
    return found


def _sparse_spans(launch: Any) -> list[tuple[int, list[Call]]]:
    case, arguments = launch.case, launch.arguments
    first = arguments["first_row"]
    call = (arguments["q"][first : first + case.rows], case.position + case.rows, (-1, -1))
    return [(arguments["request"], [call])]


def _wrong(part: Part) -> int:
    return int(wrong_of(part, budget_of(part)).sum())
