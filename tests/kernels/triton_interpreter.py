"""Run the Triton triangle kernel in Triton's interpreter, on the CPU, and compare it with an fp64 oracle.

What imports Triton runs in a worker process, see ``interpreter``.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.kernels.answer import Answer, Part
from tests.kernels.interpreter import layer_call, on_device, read_pages, strided
from tests.kernels.interpreter import use_interpreter as use_interpreter
from vllm_trimix.plan import Span


@dataclass(frozen=True)
class Case:
    """One call of the kernel.

    Attributes:
        spans: (position of the first row, rows) of each request.
        group: Query heads per KV head.
        num_kv_heads: KV heads.
        head_size: Head size.
        block_size: Tokens of a page.
        n_init: Sink keys.
        n_local: Window.
        q_dtype: Query dtype, as in ``torch``.
        cache_dtype: KV-cache dtype; "" is ``q_dtype``.
        order: Memory order of the cache's blocks, heads and slots, outermost first: BHS is vLLM's HND, BSH its NHD.
        dense: Indices of the spans whose rows see every key before them; the others are triangle rows.
        last_rows: Last rows of each span that are dense as well, where a chunk straddles the edge of the prompt's last
            rows; () is none in any.
        programs: Programs that the dense spans' keys are split for; 0 is not at all.
        scales: Whether the fp8 tensors have scales other than 1.
        soft_cap: Logit cap, 0 is off.
        tile_rows: Tokens of a tile; 0 is the kernel's default.
        huge: Name of the tensor whose outermost dimension has a stride of 2**30 elements.
    """

    spans: tuple[tuple[int, int], ...]
    group: int = 4
    num_kv_heads: int = 2
    head_size: int = 64
    block_size: int = 16
    n_init: int = 8
    n_local: int = 100
    q_dtype: str = "float16"
    cache_dtype: str = ""
    order: str = "BHS"
    dense: tuple[int, ...] = ()
    last_rows: tuple[int, ...] = ()
    programs: int = 0
    scales: bool = True
    soft_cap: float = 0.0
    tile_rows: int = 0
    huge: str = ""

    def body(self, index: int) -> int:
        """Triangle rows of a span."""
        return 0 if index in self.dense else self.spans[index][1] - (self.last_rows[index] if self.last_rows else 0)

    def facts(self) -> dict[str, bool]:
        """For the tier: whether the rule hides something, and what kind of chunks there are."""
        bodies = [(position, rows, self.body(index)) for index, (position, rows) in enumerate(self.spans)]
        return {
            "triangle": any(body and position + body > self.n_init + self.n_local for position, _, body in bodies),
            "straddling": any(0 < body < rows for _, rows, body in bodies),
            "cached": any(position > 0 for position, _, _ in bodies),
        }


@dataclass
class _Problem:
    """Tensors of a case. ``keys`` and ``values`` are the logical [num_kv_heads, seq_len, head_size] of each span."""

    arguments: dict[str, Any]
    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    first_rows: list[int]
    table_rows: list[int]
    num_slots: int


class Launch:
    """A case on a device: its arguments, its launch, and what that must give.

    Attributes:
        case: The case.
        arguments: Of ``triangle_prefill``, on the device.
        num_slots: Parts that keys were split into, a KV head; 0 where none was.
    """

    def __init__(self, case: Case, device: str = "cpu") -> None:
        self.case = case
        self._problem = _build(case)
        # A copy: whoever changes what the kernel is given does not change what it must give.
        arguments = self._problem.arguments
        self.arguments: dict[str, Any] = dict(arguments) if device == "cpu" else on_device(arguments, device)
        self.num_slots = self._problem.num_slots

    def fill(self, value: float) -> None:
        """Overwrites the output."""
        self.arguments["out"].fill_(value)

    def run(self) -> None:
        """Launches; ``outputs`` waits for it."""
        _call(self.arguments)

    def outputs(self) -> list[torch.Tensor]:
        """Copies of all that was written."""
        return [self.arguments["out"].to("cpu", copy=True)]

    def answer(self) -> Answer:
        """The output beside the definition."""
        case, problem = self.case, self._problem
        out = self.arguments["out"].cpu()
        covered = torch.zeros(out.shape[0], dtype=torch.bool)
        parts = []
        for index, (position, rows) in enumerate(case.spans):
            span = slice(problem.first_rows[index], problem.first_rows[index] + rows)
            covered[span] = True
            truth, plain = (_attention(case, problem, index, dtype) for dtype in (torch.float64, out.dtype))
            body = case.body(index)
            dense = "dense, keys split" if problem.num_slots else "dense"
            kinds = tuple(kind for kind in (("triangle", 0, body), (dense, body, rows)) if kind[1] < kind[2])
            parts.append(Part(f"{rows} rows at {position}", out[span], truth, plain, position, kinds))
        outside = not out[~covered].isnan().all()
        return Answer(parts, ["rows outside the spans were written"] if outside else [])

    def places(self) -> list[tuple[int, int]]:
        """Row of the block table, and first row of the queries, of each span."""
        return list(zip(self._problem.table_rows, self._problem.first_rows, strict=True))

    def reference(self) -> list[torch.Tensor]:
        """The parts' truth in plain PyTorch on the device, from the pages and the table that the kernel reads."""
        problem, arguments = self._problem, self.arguments
        keys, values = (
            [
                read_pages(arguments[name], arguments["block_table"][row], position + rows)
                for row, (position, rows) in zip(problem.table_rows, self.case.spans, strict=True)
            ]
            for name in ("k_cache", "v_cache")
        )
        there = replace(problem, arguments=arguments, keys=keys, values=values)
        return [_attention(self.case, there, index, torch.float64).cpu() for index in range(len(keys))]


def _call(arguments: dict[str, Any]) -> None:
    # Of the process that interprets, or compiles.
    from vllm_trimix.kernels.triton_triangle import triangle_prefill

    call, others = layer_call(arguments)
    triangle_prefill(call, **others)


def run_case(case: Case, device: str = "cpu") -> int:
    """Runs the kernel on a case and asserts the result; on ``cpu`` call it in the pool.

    Returns:
        Parts that keys were split into, a KV head; 0 where none was.
    """
    launch = Launch(case, device)
    launch.run()
    launch.answer().check()
    return launch.num_slots


def error_of(case: Case, overrides: dict[str, Any]) -> str:
    """Message of the ValueError that the call raises with some arguments replaced; "" if it raises none."""
    try:
        _call(_build(case).arguments | overrides)
    except ValueError as error:
        return str(error)
    return ""


def tile_rows(num_heads: int, num_kv_heads: int, head_size: int, dtype_size: int) -> int:
    """The kernel's default tile; call it in the pool."""
    from vllm_trimix.kernels.triton_configs import tile_rows_for

    return tile_rows_for(num_heads, num_kv_heads, head_size, dtype_size)


def _output_dtype(case: Case) -> torch.dtype:
    return torch.bfloat16 if case.q_dtype.startswith("float8") else getattr(torch, case.q_dtype)


def _visible(case: Case, index: int) -> torch.Tensor:
    """The rule of span ``index``: [rows, seq_len] bool."""
    position, rows = case.spans[index]
    i = torch.arange(position, position + rows)[:, None]
    j = torch.arange(position + rows)[None, :]
    return (j <= i) & ((j < case.n_init) | (i - j < case.n_local) | (i >= position + case.body(index)))


def _build(case: Case) -> _Problem:
    from vllm_trimix.kernels.triton_configs import tile_rows_for
    from vllm_trimix.kernels.triton_merge import Partials
    from vllm_trimix.kernels.work_items import IDLE, cut_work, max_slots

    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    q_dtype = getattr(torch, case.q_dtype)
    cache_dtype = getattr(torch, case.cache_dtype or case.q_dtype)
    out_dtype = _output_dtype(case)
    num_heads = case.num_kv_heads * case.group

    # Rows of other work surround the spans: their queries are finite, their outputs must stay NaN.
    gap = 3
    first_rows, num_tokens = [], gap
    for _, rows in case.spans:
        first_rows.append(num_tokens)
        num_tokens += rows + gap
    q = strided((num_tokens, num_heads, case.head_size), q_dtype, huge=case.huge == "q")
    out = strided((num_tokens, num_heads, case.head_size), out_dtype, huge=case.huge == "out")
    q.fill_(1)
    out.fill_(math.nan)

    seq_lens = [position + rows for position, rows in case.spans]
    max_blocks = -(-max(seq_lens) // case.block_size)
    num_blocks = 1 + sum(-(-length // case.block_size) for length in seq_lens)
    # K and V of a token lie side by side, as in vLLM's cache.
    extent = {"B": num_blocks, "H": case.num_kv_heads, "S": case.block_size}
    shape = (*(extent[dim] for dim in case.order), 2 * case.head_size)
    cache = strided(shape, cache_dtype, huge=case.huge == "cache")
    cache = cache.permute(*(case.order.index(dim) for dim in "BHS"), 3)
    k_cache, v_cache = cache.split(case.head_size, dim=-1)

    # Requests sit in shuffled rows of the block table; pages are shuffled, and page 0 is nobody's.
    num_requests = len(case.spans)
    table_rows = (1 + torch.randperm(num_requests + 1, generator=generator))[:num_requests].tolist()
    block_table = strided((num_requests + 2, max_blocks), torch.int32, huge=case.huge == "block_table").zero_()
    free_pages = (1 + torch.randperm(num_blocks - 1, generator=generator)).tolist()

    step = case.tile_rows or tile_rows_for(num_heads, case.num_kv_heads, case.head_size, q_dtype.itemsize)
    spans: tuple[list[Span], list[Span]] = ([], [])
    all_keys, all_values = [], []
    for index, ((position, rows), first_row, table_row) in enumerate(
        zip(case.spans, first_rows, table_rows, strict=True)
    ):
        shape = (case.num_kv_heads, position + rows, case.head_size)
        keys = torch.randn(shape, generator=generator).to(cache_dtype)
        values = torch.randn(shape, generator=generator).to(cache_dtype)
        all_keys.append(keys)
        all_values.append(values)
        q[first_row : first_row + rows] = torch.randn(rows, *q.shape[1:], generator=generator).to(q_dtype)
        # Only what some row sees is ever written; a page without any such key is not even in the table.
        seen = _visible(case, index).any(dim=0).nonzero().flatten()
        for block in (seen // case.block_size).unique().tolist():
            page_id = free_pages.pop()
            block_table[table_row, block] = page_id
            here = seen[seen // case.block_size == block]
            k_cache[page_id][:, here % case.block_size] = keys[:, here]
            v_cache[page_id][:, here % case.block_size] = values[:, here]
        body = case.body(index)
        if body:
            spans[0].append(Span(table_row, first_row, body, position))
        if body < rows:
            spans[1].append(Span(table_row, first_row + body, rows - body, position + body))
    work = cut_work(
        *spans,
        tile_rows=step,
        n_init=case.n_init,
        n_local=case.n_local,
        num_kv_heads=case.num_kv_heads,
        target_programs=case.programs,
    )
    assert work.num_slots <= max_slots(case.num_kv_heads, case.programs)
    partials = None
    if case.programs:
        partials = Partials.allocate(
            max_slots(case.num_kv_heads, case.programs),
            num_heads=num_heads,
            num_kv_heads=case.num_kv_heads,
            head_size=case.head_size,
            tile_rows=step,
            device=torch.device("cpu"),
        )
        # What the kernel doesn't write must not matter.
        partials.values.fill_(math.nan)
        partials.stats.fill_(math.nan)

    def scale(value: float, dtype: torch.dtype) -> torch.Tensor | None:
        return torch.tensor([value]) if case.scales and dtype.itemsize == 1 else None

    arguments = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": block_table,
        "items": torch.cat([torch.tensor([IDLE], dtype=torch.int32), torch.from_numpy(work.items)]),
        "merges": torch.from_numpy(work.merges) if work.num_slots else None,
        "partials": partials,
        "n_init": case.n_init,
        "n_local": case.n_local,
        "scale": case.head_size**-0.5,
        "out": out,
        "tile_rows": step,
        "q_scale": scale(1.25, q_dtype),
        "k_scale": scale(0.75, cache_dtype),
        "v_scale": scale(1.5, cache_dtype),
        "soft_cap": case.soft_cap,
    }
    return _Problem(arguments, all_keys, all_values, first_rows, table_rows, work.num_slots)


def _attention(case: Case, problem: _Problem, index: int, dtype: torch.dtype) -> torch.Tensor:
    """Span ``index`` by definition, every step in ``dtype``: [rows, num_heads, head_size]."""
    arguments = problem.arguments
    rows = case.spans[index][1]
    first_row = problem.first_rows[index]

    def dequantised(tensor: torch.Tensor, name: str) -> torch.Tensor:
        factor = arguments[name]
        return tensor.to(dtype) if factor is None else tensor.to(dtype) * factor.to(dtype)

    q = dequantised(arguments["q"][first_row : first_row + rows], "q_scale").transpose(0, 1)
    keys = dequantised(problem.keys[index], "k_scale").repeat_interleave(case.group, dim=0)
    values = dequantised(problem.values[index], "v_scale").repeat_interleave(case.group, dim=0)
    scores = (q @ keys.transpose(1, 2)) * arguments["scale"]
    if case.soft_cap > 0:
        scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
    scores = scores.masked_fill(~_visible(case, index).to(scores.device), -math.inf)
    return (torch.softmax(scores, dim=-1) @ values).transpose(0, 1)
