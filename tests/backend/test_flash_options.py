"""The triangle by FlashAttention: two launches merged, and tiles of pages; vLLM's kernels are stood in for."""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("vllm", reason="FlashAttention is vLLM's")

from tests.backend.flash_on_cpu import FlashOnCpu, flash_on_cpu
from tests.budget import assert_within_budget
from vllm_trimix.backend.triangle.flash_merge import FlashMergePrefill
from vllm_trimix.backend.triangle.flash_pages import TILE_ROWS, FlashPagesPrefill, list_pages, visible
from vllm_trimix.backend.triangle.prefill import LayerGroup, LayerShape, TrianglePrefill
from vllm_trimix.backend.upload import upload
from vllm_trimix.kernels.layer_call import LayerCall, Scales
from vllm_trimix.kernels.reference import masked_attention
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Plan, Span

OPTIONS: dict[str, type[TrianglePrefill]] = {"merge": FlashMergePrefill, "pages": FlashPagesPrefill}
CPU = torch.device("cpu")
FP8 = torch.float8_e4m3fn
SMALL = LayerGroup(frozenset({LayerShape(8, 2, 16)}), Triangle(), dtype_size=4, block_size=16, device=CPU)


@dataclasses.dataclass(frozen=True)
class Case:
    """One step of one layer.

    Attributes:
        option: Key of ``OPTIONS``.
        spans: (position, rows, rows of other work before it) of each triangle span; each is a request of its own.
        layers: How often the step is run.
        version: FlashAttention's.
    """

    option: str
    spans: tuple[tuple[int, int, int], ...]
    group: int = 4
    num_kv_heads: int = 2
    head_size: int = 16
    block_size: int = 16
    n_init: int = 8
    n_local: int = 40
    dtype: torch.dtype = torch.float32
    cache_dtype: torch.dtype | None = None
    soft_cap: float = 0.0
    layers: int = 1
    version: int = 3


def run(case: Case) -> FlashOnCpu:
    """Runs a case and asserts its rows, and that no other was written; returns what was called."""
    generator = torch.Generator().manual_seed(zlib.crc32(repr(case).encode()))
    num_heads, head_size, block_size = case.num_kv_heads * case.group, case.head_size, case.block_size
    spans, row = [], 0
    # Requests without triangle rows lie between.
    for index, (position, num_rows, gap) in enumerate(case.spans):
        row += gap
        spans.append(Span(2 * index + 1, row, num_rows, position))
        row += num_rows
    num_tokens = row + 2
    cache_dtype = case.cache_dtype or case.dtype
    q_dtype = FP8 if cache_dtype == FP8 else case.dtype

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(cache_dtype)

    ends = [span.position + span.num_rows for span in spans]
    used = [-(-end // block_size) for end in ends]
    pages = (torch.randperm(sum(used), generator=generator) + 1).split(used)
    # Page 0 and unused slots hold NaN, unused columns name page 0.
    block_table = torch.zeros(2 * len(spans) + 1, max(used) + 3, dtype=torch.int32)
    stored = torch.full((sum(used) + 1, block_size, case.num_kv_heads, 2 * head_size), torch.nan).to(cache_dtype)
    keys = []
    for span, end, ids in zip(spans, ends, pages, strict=True):
        block_table[span.request, : len(ids)] = ids
        tokens = random(end, case.num_kv_heads, 2 * head_size)
        slots = ids[torch.arange(end) // block_size] * block_size + torch.arange(end) % block_size
        bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache_dtype.itemsize]
        stored.view(bits).flatten(0, 1)[slots] = tokens.view(bits)
        keys.append(tokens)
    k_cache, v_cache = stored.transpose(1, 2).split(head_size, dim=-1)
    # As in vLLM, queries are a part of one product with keys and values.
    qkv = torch.randn(num_tokens, num_heads + 2, head_size, generator=generator).to(q_dtype)
    q = qkv[:, :num_heads]
    one = torch.tensor([0.5]) if cache_dtype == FP8 else None
    scales = Scales(one, None if one is None else one + 0.25, None if one is None else one + 1)
    scale = head_size**-0.5

    plan = Plan(triangle=spans)
    with flash_on_cpu(version=case.version) as calls:
        shape, triangle = LayerShape(num_heads, case.num_kv_heads, head_size), Triangle(case.n_init, case.n_local, 0)
        prefill = OPTIONS[case.option](LayerGroup(frozenset({shape}), triangle, case.dtype.itemsize, block_size, CPU))
        step = prefill.bind(plan, upload(prefill.arrays(plan), CPU), block_table)
        outs = [torch.full((num_tokens, num_heads, head_size), torch.nan, dtype=case.dtype) for _ in range(case.layers)]
        for out in outs:
            prefill.run(step, LayerCall(q, k_cache, v_cache, out, scale, case.soft_cap, scales))

    covered = torch.zeros(num_tokens, dtype=torch.bool)
    truth, plain = [], []
    for span, end, tokens in zip(spans, ends, keys, strict=True):
        rows = slice(span.first_row, span.first_row + span.num_rows)
        covered[rows] = True
        mask = mask_of(case, torch.arange(span.position, end), torch.arange(end))
        inputs = [q[rows], *tokens.split(head_size, dim=-1)]
        for found, dtype in ((truth, torch.float64), (plain, case.dtype)):
            low = [x.to(dtype) for x in inputs]
            found.append(attention(low, mask, scales, scale=scale, soft_cap=case.soft_cap))
    for out in outs:
        assert_within_budget(out[covered], torch.cat(truth), torch.cat(plain), what=case.option)
    for out in outs:
        assert out[~covered].isnan().all(), "rows of other work were written"
    return calls


def mask_of(case: Case, i: torch.Tensor, j: torch.Tensor) -> torch.Tensor:
    if case.option == "pages":
        return visible(i, j, n_init=case.n_init, n_local=case.n_local, block_size=case.block_size)
    return Triangle(case.n_init, case.n_local, 0).mask(i, j, prompt_len=10**9)


def attention(
    inputs: list[torch.Tensor], mask: torch.Tensor, scales: Scales, *, scale: float, soft_cap: float
) -> torch.Tensor:
    """The definition, in the inputs' precision."""
    q, k, v = (x if factor is None else x * factor.to(x.dtype) for x, factor in zip(inputs, scales, strict=True))
    if not soft_cap:
        return masked_attention(q, k, v, mask, scale=scale)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = soft_cap * torch.tanh(torch.einsum("qhd,khd->hqk", q, k) * scale / soft_cap)
    return torch.einsum("hqk,khd->qhd", torch.softmax(scores.masked_fill(~mask, -torch.inf), dim=-1), v)


def mixed(n_init: int, n_local: int) -> tuple[tuple[int, int, int], ...]:
    """Spans before, across and after the position where the window leaves the sinks, scattered, some of one row."""
    edge = n_init + n_local
    around = tuple((max(0, edge + offset), 1, offset % 2) for offset in range(-3, 3))
    return ((0, edge + 60, 3), *around, (edge - 2, 5, 0), (200, 150, 0), (0, 1, 1), (300, 1, 4), (0, 9, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("n_init", [0, 8, 20])
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("option", OPTIONS)
def test_matches_the_definition(option: str, group: int, n_init: int, block_size: int, dtype: torch.dtype) -> None:
    run(Case(option, mixed(n_init, 40), group=group, n_init=n_init, block_size=block_size, dtype=dtype))


CASES = {
    "whole-prompt": Case("", ((0, 400, 0),)),
    "late-chunk": Case("", ((300, 130, 5),)),
    "one-row": Case("", ((100, 1, 0),)),
    "rows-of-one": Case("", tuple((100 + 40 * index, 1, index) for index in range(4))),
    "window-of-one": Case("", ((0, 70, 0), (90, 40, 2)), n_local=1),
    "no-sinks-window-of-one": Case("", ((0, 70, 0), (90, 40, 2)), n_init=0, n_local=1),
    "window-beyond-the-prompt": Case("", ((0, 70, 0), (200, 50, 1)), n_local=2**31 - 1),
    "sinks-beyond-the-prompt": Case("", ((0, 70, 0), (200, 50, 1)), n_init=2**31 - 1, n_local=1),
    "sinks-of-a-page": Case("", ((0, 300, 0), (310, 40, 1)), n_init=16, n_local=16),
    "published-window": Case("", ((0, 700, 0), (1500, 200, 0), (1024, 128, 1)), n_local=512, num_kv_heads=1),
    "soft-cap": Case("", mixed(8, 40), soft_cap=1.5),
    "fp8": Case("", mixed(8, 40), dtype=torch.bfloat16, cache_dtype=FP8),
    "one-kv-head": Case("", mixed(8, 40), num_kv_heads=1),
    "several-layers": Case("", mixed(8, 40), layers=3),
    "fa2": Case("", mixed(8, 40), version=2),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("option", OPTIONS)
def test_shapes_that_break_things(option: str, name: str) -> None:
    case = dataclasses.replace(CASES[name], option=option)
    assert {call["version"] for call in run(case).calls} == {case.version}


spans = st.lists(st.tuples(st.integers(0, 400), st.integers(1, 150), st.integers(0, 2)), min_size=1, max_size=4)
cases = st.fixed_dictionaries(
    {
        # A budget from one row's few values would be luck: the first rows of a prompt are always there.
        "spans": spans.map(lambda drawn: (*drawn, (0, 40, 0))),
        "group": st.integers(1, 3),
        "num_kv_heads": st.integers(1, 2),
        "block_size": st.sampled_from([16, 32, 48, 64]),
        "n_init": st.integers(0, 70),
        "n_local": st.integers(1, 150),
    }
)


@settings(deadline=None, max_examples=40)
@given(cases)
def test_merge_of_any_step(case: dict[str, Any]) -> None:
    run(Case("merge", **case))


@settings(deadline=None, max_examples=40)
@given(cases)
def test_pages_of_any_step(case: dict[str, Any]) -> None:
    run(Case("pages", **case))


@pytest.mark.parametrize("option", OPTIONS)
def test_rows_without_gaps_are_not_copied(option: str) -> None:
    """Queries and outputs are views; only the sinks' output is FlashAttention's own."""
    calls = run(Case(option, ((0, 100, 4), (100, 60, 0)))).calls
    assert all(call["q"].stride(0) > call["q"].shape[1] * call["q"].shape[2] for call in calls if len(call["q"]) > 48)
    assert [call["out"] is None for call in calls] == [False] if option == "pages" else [False, False, True]


def test_what_merge_launches() -> None:
    """A launch only for rows that there are, and a merge only where there are sinks."""

    def launches(**changes: Any) -> tuple[list[tuple[bool, Any]], int]:
        calls = run(Case("merge", **changes))
        return [(call["causal"], call["window_size"]) for call in calls.calls], calls.merges

    early, window, sinks = (True, None), (True, [39, 0]), (False, None)
    assert launches(spans=((0, 47, 0),)) == ([early], 0)
    assert launches(spans=((0, 48, 0),)) == ([early, window, sinks], 1)
    assert launches(spans=((47, 9, 0),)) == ([window, sinks], 1)
    assert launches(spans=((0, 100, 0),), n_init=0) == ([window], 0)


@pytest.mark.parametrize("option", OPTIONS)
def test_steps_without_rows_launch_nothing(option: str) -> None:
    with flash_on_cpu() as calls:
        prefill = OPTIONS[option](SMALL)
        table = torch.zeros(1, 4, dtype=torch.int32)
        cache, q = torch.zeros(5, 2, 16, 16), torch.zeros(3, 8, 16)
        empty = prefill.bind(Plan(), prefill.arrays(Plan()), table)
        for step in (prefill.idle(table), empty):
            prefill.run(step, LayerCall(q, cache, cache, q, 1.0))
    assert calls.calls == []


@pytest.mark.parametrize("option", OPTIONS)
def test_refuses_devices_without_flash_attention(option: str) -> None:
    with flash_on_cpu(version=None), pytest.raises(RuntimeError, match="no FlashAttention for head_size 16"):
        OPTIONS[option](SMALL)


def test_pages_refuse_another_page_size() -> None:
    plan = Plan(triangle=[Span(0, 0, 3, 0)])
    with flash_on_cpu():
        prefill = FlashPagesPrefill(SMALL)
        table = torch.zeros(1, 4, dtype=torch.int32)
        step = prefill.bind(plan, upload(prefill.arrays(plan), CPU), table)
        cache, q = torch.zeros(5, 2, 32, 16), torch.zeros(3, 8, 16)
        with pytest.raises(ValueError, match="k_cache has pages of 32 tokens; planned for 16"):
            prefill.run(step, LayerCall(q, cache, cache, q, 1.0))


@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("n_local", [1, 16, 40, 129, 512])
@pytest.mark.parametrize("n_init", [0, 1, 8, 16, 20, 200])
def test_pages_are_the_triangle_rounded_up(n_init: int, n_local: int, block_size: int) -> None:
    """A superset, never of later keys, and no wider than a tile and a page at each end."""
    i = torch.arange(900)
    seen = visible(i, i, n_init=n_init, n_local=n_local, block_size=block_size)
    exact = Triangle(n_init, n_local, 0).mask(i, i, prompt_len=10**9)
    wider = Triangle(n_init + block_size - 1 if n_init else 0, n_local + TILE_ROWS + block_size - 2, 0)
    assert (seen | ~exact).all()
    assert (~seen | wider.mask(i, i, prompt_len=10**9)).all()


def test_page_lists() -> None:
    """Tiles end at multiples of 128 positions; sinks on page 0, pages between them and the window left out."""
    lists = list_pages([Span(3, 10, 140, 250)], n_init=8, n_local=20, block_size=16)
    assert lists.tiles.tolist() == [[3, 10, 6, 250], [3, 16, 128, 256], [3, 144, 6, 384]]
    # The first tile's window starts at 128 - 19, the second's at 256 - 19.
    assert lists.columns[:, :4].tolist() == [[0, 6, 7, 8], [0, 14, 15, 16], [0, 22, 23, 24]]
    assert lists.columns[0].tolist() == [0, *range(6, 16)]
    assert lists.columns[2].tolist() == [0, 22, 23, 24, *[0] * 7]
    assert lists.seqused_k.tolist() == [256 - 5 * 16, 384 - 13 * 16, 390 - 21 * 16]


@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("n_init", [0, 1, 16, 20])
def test_page_lists_hold_what_is_visible(n_init: int, block_size: int) -> None:
    """For windows that end at every slot of a page, the keys on a tile's pages are those its last row sees."""
    for n_local in range(1, 2 * block_size + 3):
        span = Span(0, 0, 300, 100)
        lists = list_pages([span], n_init=n_init, n_local=n_local, block_size=block_size)
        for tile, columns, seqused_k in zip(lists.tiles, lists.columns, lists.seqused_k, strict=True):
            last = torch.tensor([tile[3] + tile[2] - 1])
            keys = (columns[:, None] * block_size + np.arange(block_size)).reshape(-1)[:seqused_k]
            seen = visible(last, torch.arange(400), n_init=n_init, n_local=n_local, block_size=block_size)[0]
            assert keys.tolist() == seen.nonzero()[:, 0].tolist(), (n_local, tile)


@pytest.mark.parametrize("position", [0, 1, 127, 128, 129, 300])
def test_tiles_cover_every_row_once(position: int) -> None:
    spans = [Span(0, 2, 1, position), Span(4, 9, 300, position)]
    tiles = list_pages(spans, n_init=8, n_local=40, block_size=16).tiles.tolist()
    rows = [(t[0], t[1] + row, t[3] + row) for t in tiles for row in range(t[2])]
    assert rows == list(
        itertools.chain.from_iterable(
            ((s.request, s.first_row + row, s.position + row) for row in range(s.num_rows)) for s in spans
        )
    )
