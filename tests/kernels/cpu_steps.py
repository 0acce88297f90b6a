"""Whole steps of triangle layers and of layers with dynamic patterns, by the CPU kernels and by definition."""

from __future__ import annotations

import functools
import zlib
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from tests.kernels.definition import compare
from tests.kernels.selected import kernel_of
from tests.kernels.step import Scheduled, Shape, attend_stock, build, planned
from vllm_trimix.backend.dynamic import cpu_pages
from vllm_trimix.backend.dynamic import prefill as dynamic
from vllm_trimix.backend.dynamic.cpu_pages import CpuPages
from vllm_trimix.backend.dynamic.key_counter import KeyCounter
from vllm_trimix.backend.dynamic.layer_patterns import LayerPatterns
from vllm_trimix.kernels import torch_cpu
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.selection import Chunk, Selection
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import build_dynamic_plan, build_plan

ATTENDS = {"bmm": torch_cpu.attend_bmm, "fp32": torch_cpu.attend_fp32, "sdpa": torch_cpu.attend_sdpa}


@dataclass(frozen=True)
class TriangleStep:
    """A step in a triangle layer.

    Attributes:
        shape: Heads and pages. With vLLM's own pages its operator computes the rows that stay dense, else nothing does.
        requests: The step.
        pattern: The rule.
        min_prompt_len: Shorter prompts stay dense.
        attend: Tile kernel, a name in ``ATTENDS``, or "" for the one that this CPU gets.
        threads: Threads that the kernel believes in: it batches tiles for them.
        sharpness: Softmax scale, relative to the usual one.
    """

    shape: Shape
    requests: tuple[Scheduled, ...]
    pattern: Triangle
    min_prompt_len: int = 0
    attend: str = ""
    threads: int = 1
    sharpness: float = 1.0

    def is_sparse(self, request: Scheduled) -> bool:
        """Whether the rule hides keys of such a prompt."""
        return request.prompt_len >= self.min_prompt_len and not self.pattern.is_dense(request.prompt_len)

    def facts(self) -> dict[str, bool]:
        """For the tier."""
        return _facts([r for r in self.requests if self.is_sparse(r)], self.requests, self.pattern.last_n) | {
            "triangle": any(
                self.is_sparse(r) and r.position < r.prompt_len - self.pattern.last_n for r in self.requests
            )
        }


@dataclass(frozen=True)
class DynamicStep:
    """A step in a layer of dynamic patterns.

    Attributes:
        shape: As in ``TriangleStep``.
        requests: The step.
        patterns: Of the query heads, in turn.
        last_n: The prompt's last rows, which stay dense.
        min_seq_len: Chunks that end at fewer tokens stay dense.
        min_rows: Chunks with fewer rows stay dense.
        kernel: ``torch`` or an instruction set of the compiled kernel.
        slab: KV heads done at once, 0: all.
        in_parts: Whether each tile has an index of its own.
        sharpness: Softmax scale, relative to the usual one.
    """

    shape: Shape
    requests: tuple[Scheduled, ...]
    patterns: tuple[DynamicPattern, ...]
    last_n: int
    min_seq_len: int = 0
    min_rows: int = 1
    kernel: str = "torch"
    slab: int = 0
    in_parts: bool = False
    sharpness: float = 1.0

    def facts(self) -> dict[str, bool]:
        """For the tier."""
        return _facts(self.requests, self.requests, self.last_n)


def _facts(sparse: list[Scheduled] | tuple[Scheduled, ...], requests: Any, last_n: int) -> dict[str, bool]:
    return {
        "straddling": any(r.position < r.prompt_len - last_n < r.end and last_n > 0 for r in sparse),
        "cached": any(r.position > 0 for r in requests),
    }


def check_triangle_step(case: TriangleStep) -> None:
    """Plans the step, computes it, and compares every row with the rule."""
    shape, pattern = case.shape, case.pattern
    masks, sparse_rows = [], []
    for request in case.requests:
        i, j = torch.arange(request.position, request.end), torch.arange(request.end)
        rule = pattern if case.is_sparse(request) else Triangle(0, 2**31 - 1, 0)
        masks.append(rule.mask(i, j, request.prompt_len))
        sparse_rows.append(case.is_sparse(request) & (i < request.prompt_len - pattern.last_n))
    hidden = None
    if shape.layouts is not None:
        # Dense rows aren't computed: what they alone would read needn't be there.
        hidden = [~mask[rows].any(0) for mask, rows in zip(masks, sparse_rows, strict=True)]
    tensors = build(shape, case.requests, seed=zlib.crc32(repr(case).encode()), hidden=hidden)
    scale = case.sharpness * shape.head_size**-0.5
    plan = build_plan(*planned(case.requests), pattern=pattern, min_prompt_len=case.min_prompt_len)
    k_pages, v_pages = tensors.pages
    with mock.patch.object(torch, "get_num_threads", return_value=case.threads):
        torch_cpu.triangle_prefill(
            tensors.q,
            k_pages,
            v_pages,
            tensors.block_table,
            plan.triangle,
            k_layout=tensors.layouts[0],
            v_layout=tensors.layouts[1],
            block_size=shape.page_size,
            n_init=pattern.n_init,
            n_local=pattern.n_local,
            scale=scale,
            out=tensors.out,
            attend=ATTENDS.get(case.attend),
        )
    if shape.layouts is None:
        attend_stock(shape, tensors, plan.dense, scale)
    _compare_rows(case, tensors, masks, sparse_rows, scale)


def _compare_rows(
    case: Any, tensors: Any, masks: list[torch.Tensor], sparse_rows: list[torch.Tensor], scale: float
) -> None:
    """Every request's rows with their masks, [rows, keys] or [heads, rows, keys]; nothing else may be written."""
    for index, (mask, sparse) in enumerate(zip(masks, sparse_rows, strict=True)):
        rows = tensors.rows(index)
        out, q, what = tensors.out[rows], tensors.q[rows], f"request {index}"
        mask = mask if mask.dim() == 3 else mask[None]
        keys, values = tensors.keys[index], tensors.values[index]
        if case.shape.layouts is not None:
            assert out[~sparse].isnan().all(), f"{what}: rows of another kernel were written"
            out, q, mask = out[sparse], q[sparse], mask[:, sparse]
        if len(q):
            compare(out, q, keys, values, mask, scale, what=what)
    assert tensors.out[tensors.starts[-1] :].isnan().all(), "rows after the step were written"


def check_dynamic_step(case: DynamicStep) -> None:
    """Plans the step, lets the patterns choose, computes it, and compares every row with the choice's own mask."""
    shape = case.shape
    tensors = build(shape, case.requests, seed=zlib.crc32(repr(case).encode()))
    scale = case.sharpness * shape.head_size**-0.5
    plan = build_dynamic_plan(
        *planned(case.requests), last_n=case.last_n, min_seq_len=case.min_seq_len, min_rows=case.min_rows
    )
    heads = [case.patterns[head % len(case.patterns)] for head in range(shape.num_heads)]
    patterns = LayerPatterns(heads, num_kv_heads=shape.num_kv_heads, device=torch.device("cpu"))
    pages = CpuPages(*tensors.pages, tensors.block_table, tensors.layouts, shape.page_size, scale)
    choices: list[Selection] = []

    def select(groups: Any, chunk: Chunk) -> Selection:
        choices.append(chosen(groups, chunk))
        return choices[-1]

    chosen = dynamic.select
    counter = KeyCounter(torch.device("cpu"))
    with ExitStack() as patched:
        patch = functools.partial(mock.patch.object, dynamic)
        patched.enter_context(patch("select", select))
        patched.enter_context(mock.patch.object(cpu_pages, "cpu_kernel", return_value=kernel_of(case.kernel)))
        if case.slab:
            longest = max(request.end for request in case.requests)
            patched.enter_context(patch("MAX_KEY_BYTES", case.slab * longest * pages.bytes_per_token))
        if case.in_parts:
            patched.enter_context(patch("MAX_INDEX_BYTES", 1))
        dynamic.prefill(patterns, plan.spans, tensors.q, pages, tensors.out, counter)
    if shape.layouts is None:
        attend_stock(shape, tensors, plan.dense, scale)

    masks, sparse_rows = [], []
    left = iter(choices)
    for request in case.requests:
        i, j = torch.arange(request.position, request.end), torch.arange(request.end)
        sparse = (i < request.prompt_len - case.last_n) & _is_chosen(case, request)
        mask = (j <= i[:, None]).repeat(shape.num_heads, 1, 1)
        if sparse.any():
            mask[:, sparse] = torch.cat(list(_masks(left, request.end, shape.num_heads)))
        masks.append(mask)
        sparse_rows.append(sparse)
    assert next(left, None) is None, "rows were chosen for that the plan leaves dense"
    _compare_rows(case, tensors, masks, sparse_rows, scale)
    assert 0 <= int(counter.read) <= counter.causal


def _masks(choices: Iterator[Selection], num_keys: int, num_heads: int) -> Iterator[torch.Tensor]:
    """The masks of a request's slabs, as many as have all heads."""
    found = 0
    while found < num_heads:
        choice = next(choices)
        found += choice.blocks.shape[0]
        yield choice.mask(num_keys)


def _is_chosen(case: DynamicStep, request: Scheduled) -> bool:
    """Whether the request's rows before the last ones follow the patterns."""
    prompt_rows = min(request.end, request.prompt_len) - request.position
    body = min(prompt_rows, request.prompt_len - case.last_n - request.position)
    return request.position + prompt_rows >= case.min_seq_len and body >= case.min_rows
