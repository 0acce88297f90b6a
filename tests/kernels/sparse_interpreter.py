"""Run the sparse Triton kernel on a made-up selection and compare it with fp64 attention under ``Selection.mask``.

What imports Triton runs in a worker process, see ``interpreter``.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from tests.kernels.answer import Answer, Part
from tests.kernels.interpreter import layer_call, on_device, read_pages, strided
from tests.kernels.sparse_selection import SparseCase, listed_keys, made_up
from vllm_trimix.kernels.sparse_index import Place, SparseIndex, build_index, idle_index
from vllm_trimix.patterns.selection import Selection

# Rows, and heads of each side of the slab, of other work: finite queries whose outputs must stay NaN.
_GAP = 3


@dataclass
class _Problem:
    """Tensors of a case. ``keys`` and ``values`` are the logical [num_kv_heads, num_keys, head_size]."""

    arguments: dict[str, Any]
    selection: Selection
    keys: torch.Tensor
    values: torch.Tensor
    all_read: torch.Tensor


class Launch:
    """A case on a device: its arguments, its launch, and what that must give.

    Attributes:
        case: The case.
        arguments: Of ``sparse_prefill``, on the device.
    """

    def __init__(self, case: SparseCase, device: str = "cpu") -> None:
        self.case = case
        self._problem = problem = _build(case)
        self.arguments: dict[str, Any] = dict(problem.arguments)
        if device != "cpu":
            problem.all_read = problem.all_read.to(device)
            index: SparseIndex = problem.arguments["index"]
            parts: dict[str, Any] = {
                name: part.to(device) for name, part in index._asdict().items() if isinstance(part, torch.Tensor)
            }
            moved = index._replace(**parts)
            read = problem.all_read[:, : problem.arguments["keys_read"].shape[1]]
            self.arguments = on_device(problem.arguments, device) | {"index": moved, "keys_read": read}

    def fill(self, value: float) -> None:
        """Overwrites the output."""
        self.arguments["out"].fill_(value)
        self._problem.all_read.fill_(-1)

    def run(self) -> None:
        """Launches; ``outputs`` waits for it."""
        _call(self.arguments)

    def outputs(self) -> list[torch.Tensor]:
        """Copies of all that was written."""
        return [tensor.to("cpu", copy=True) for tensor in (self.arguments["out"], self._problem.all_read)]

    def answer(self) -> Answer:
        """The output beside the definition."""
        return _judge(self.case, self._problem, self.arguments["out"].cpu())

    def reference(self) -> list[torch.Tensor]:
        """The part's truth in plain PyTorch on the device, from the pages and the table that the kernel reads."""
        arguments, num_keys = self.arguments, self.case.position + self.case.rows
        pages = arguments["block_table"][arguments["request"]]
        keys, values = (read_pages(arguments[name], pages, num_keys) for name in ("k_cache", "v_cache"))
        there = replace(self._problem, arguments=arguments, keys=keys, values=values)
        return [_attention(self.case, there, torch.float64).cpu()]


def _call(arguments: dict[str, Any], **kwargs: Any) -> Any:
    # Of the process that interprets, or compiles.
    from vllm_trimix.kernels.triton_sparse import sparse_prefill

    call, others = layer_call(arguments)
    place = Place(*(others.pop(name) for name in Place._fields))
    return sparse_prefill(call, place=place, **others, **kwargs)


def run_case(case: SparseCase, device: str = "cpu") -> None:
    """Runs the kernel on a case and asserts the result; on ``cpu`` call it in the pool."""
    launch = Launch(case, device)
    launch.run()
    launch.answer().check()


def run_idle(case: SparseCase) -> None:
    """Runs a launch without rows, of which nothing may be written, and one with rows by the variant it found."""
    problem = _build(case)
    arguments = problem.arguments
    index = idle_index(case.block_size, torch.device("cpu"), has_columns=case.num_columns > 0, has_band=bool(case.band))
    idle_read = torch.full((1, 1), -1, dtype=torch.int32)
    variant = _call(arguments | {"index": index, "keys_read": idle_read, "first_head": 0, "first_row": 0})
    assert arguments["out"].isnan().all()
    assert idle_read.item() == -1
    assert _call(arguments, variant=variant) is variant
    _judge(case, problem, arguments["out"]).check()


def error_of(case: SparseCase, overrides: dict[str, Any], index: dict[str, Any]) -> str:
    """Message of the ValueError that the call raises with some arguments, or parts of the index, replaced; else ""."""
    arguments = _build(case).arguments
    try:
        _call(arguments | {"index": arguments["index"]._replace(**index)} | overrides)
    except ValueError as error:
        return str(error)
    return ""


def specialisations(cases: list[SparseCase]) -> list[str]:
    """What Triton keys the compiled kernel on for each case, on Hopper; where Triton does not interpret."""
    from unittest import mock

    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    from vllm_trimix.kernels import triton_sparse

    kernel = triton_sparse.sparse_prefill_kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, make_backend(GPUTarget("cuda", 90, 32)))
    found: list[str] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            def launch(*args: Any, **kwargs: Any) -> None:
                _, specialisation, options = bind(*args, **kwargs)
                found.append(repr((specialisation, options)))

            return launch

    with mock.patch.object(triton_sparse, "sparse_prefill_kernel", Recorder()):
        for case in cases:
            _call(_build(case).arguments)
    return found


def _build(case: SparseCase) -> _Problem:
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    q_dtype = getattr(torch, case.q_dtype)
    cache_dtype = getattr(torch, case.cache_dtype or case.q_dtype)
    out_dtype = torch.bfloat16 if q_dtype.itemsize == 1 else q_dtype
    num_heads, num_keys = case.num_kv_heads * case.group, case.position + case.rows
    first_head, slab_heads = case.heads

    selection = made_up(case, generator)
    index = build_index(selection)
    # Undefined by the index's contract: nothing may come of it.
    index.block_index[torch.arange(index.block_index.shape[2]) >= index.block_count[..., None]] = 2**30
    if index.column_index is not None and index.column_count is not None:
        index.column_index[torch.arange(index.column_index.shape[2]) >= index.column_count[..., None]] = 2**30

    shape = (case.rows + 2 * _GAP, num_heads, case.head_size)
    q = strided(shape, q_dtype, huge=case.huge == "q")
    out = strided(shape, out_dtype, huge=case.huge == "out")
    q.copy_(torch.randn(shape, generator=generator))
    out.fill_(math.nan)

    # K and V of a token lie side by side, as in vLLM's cache. Page 0 is nobody's, the others are shuffled.
    max_pages = -(-num_keys // case.page_size)
    extent = {"B": 1 + max_pages, "H": case.num_kv_heads, "S": case.page_size}
    cache = strided((*(extent[dim] for dim in case.order), 2 * case.head_size), cache_dtype, huge=case.huge == "cache")
    cache = cache.permute(*(case.order.index(dim) for dim in "BHS"), 3)
    k_cache, v_cache = cache.split(case.head_size, dim=-1)
    shape = (case.num_kv_heads, num_keys, case.head_size)
    keys, values = (torch.randn(shape, generator=generator).to(cache_dtype) for _ in range(2))
    block_table = strided((4, max_pages), torch.int32, huge=case.huge == "block_table").zero_()
    request = 2
    pages = (1 + torch.randperm(max_pages, generator=generator)).tolist()
    # A KV head's keys that none of its query heads lists are never written, and pages without any are not in the table.
    listed = listed_keys(index, num_keys)
    owners = torch.arange(first_head, first_head + slab_heads) // case.group
    if case.huge == "cache":
        cache.fill_(math.nan)
    for kv_head in range(case.num_kv_heads):
        seen = listed[owners == kv_head].any(0).nonzero().flatten()
        for block in (seen // case.page_size).unique().tolist():
            block_table[request, block] = pages[block]
            here = seen[seen // case.page_size == block]
            k_cache[pages[block], kv_head, here % case.page_size] = keys[kv_head, here]
            v_cache[pages[block], kv_head, here % case.page_size] = values[kv_head, here]

    def scale(value: float, dtype: torch.dtype) -> torch.Tensor | None:
        return torch.tensor([value]) if case.scales and dtype.itemsize == 1 else None

    # Wider than the tiles: what lies beside them must stay.
    all_read = torch.full((slab_heads, selection.tiles.num_tiles + 2), -1, dtype=torch.int32)
    arguments = {
        "q": q,
        "k_cache": k_cache,
        "v_cache": v_cache,
        "block_table": block_table,
        "index": index,
        "request": request,
        "first_row": _GAP,
        "first_head": first_head,
        "scale": case.head_size**-0.5,
        "out": out,
        "keys_read": all_read[:, : selection.tiles.num_tiles],
        "q_scale": scale(1.25, q_dtype),
        "k_scale": scale(0.75, cache_dtype),
        "v_scale": scale(1.5, cache_dtype),
        "soft_cap": case.soft_cap,
    }
    return _Problem(arguments, selection, keys, values, all_read)


def _judge(case: SparseCase, problem: _Problem, out: torch.Tensor) -> Answer:
    first_head, slab_heads = case.heads
    covered = torch.zeros(out.shape[:2], dtype=torch.bool)
    covered[_GAP : _GAP + case.rows, first_head : first_head + slab_heads] = True
    got = out[_GAP : _GAP + case.rows, first_head : first_head + slab_heads]
    truth, plain = (_attention(case, problem, dtype) for dtype in (torch.float64, out.dtype))
    what = f"{case.rows} rows at {case.position}"
    answer = Answer([Part(what, got, truth, plain, case.position, (("sparse", 0, case.rows),))])
    if not out[~covered].isnan().all():
        answer.faults.append("rows or heads outside the call's were written")
    read = problem.all_read.cpu()
    if not torch.equal(read[:, :-2], problem.arguments["index"].keys_read()):
        answer.faults.append("keys_read differs from what the index lists")
    if not (read[:, -2:] == -1).all():
        answer.faults.append("keys_read beside the tiles was written")
    return answer


def _attention(case: SparseCase, problem: _Problem, dtype: torch.dtype) -> torch.Tensor:
    """The call's rows and heads by definition, every step in ``dtype``: [rows, slab heads, head_size]."""
    arguments = problem.arguments
    first_head, slab_heads = case.heads
    owners = torch.arange(first_head, first_head + slab_heads) // case.group

    def dequantised(tensor: torch.Tensor, name: str) -> torch.Tensor:
        factor = arguments[name]
        return tensor.to(dtype) if factor is None else tensor.to(dtype) * factor.to(dtype)

    q = arguments["q"][_GAP : _GAP + case.rows, first_head : first_head + slab_heads]
    q = dequantised(q, "q_scale").transpose(0, 1)
    keys = dequantised(problem.keys, "k_scale")[owners]
    values = dequantised(problem.values, "v_scale")[owners]
    scores = (q @ keys.transpose(1, 2)) * arguments["scale"]
    if case.soft_cap > 0:
        scores = case.soft_cap * torch.tanh(scores / case.soft_cap)
    mask = problem.selection.mask(case.position + case.rows).to(scores.device)
    scores = scores.masked_fill(~mask, -math.inf)
    return (torch.softmax(scores, dim=-1) @ values).transpose(0, 1)
