"""The work items against the rule: every row's visible keys exactly once, within the workspace, enough programs."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_trimix.kernels.triton_configs import tile_rows_for
from vllm_trimix.kernels.work_items import DENSE, WHOLE, cut_work, max_slots
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Request, Span, build_plan

# Multiprocessors of an H100 or H200.
MULTIPROCESSORS = 132


@st.composite
def _spans(draw: st.DrawFn) -> tuple[list[Span], list[Span]]:
    """Triangle and dense spans of different requests, rows in any order, gaps between them."""
    kinds: tuple[list[Span], list[Span]] = ([], [])
    row = 0
    for request in range(draw(st.integers(0, 5))):
        row += draw(st.integers(0, 3))
        rows = draw(st.integers(1, 90))
        kinds[draw(st.booleans())].append(Span(request, row, rows, draw(st.integers(0, 3000))))
        row += rows
    return kinds


@settings(max_examples=300, deadline=None)
@given(
    spans=_spans(),
    tile_rows=st.integers(1, 33),
    n_init=st.sampled_from([0, 1, 8, 100, 5000, 2**31 - 1]),
    n_local=st.sampled_from([1, 7, 512, 2**31 - 1]),
    num_kv_heads=st.integers(1, 8),
    target=st.sampled_from([0, 7, 64, 1000]),
)
def test_every_row_sees_its_keys_once(spans, tile_rows, n_init, n_local, num_kv_heads, target):
    band, tails = spans
    work = cut_work(
        band,
        tails,
        tile_rows=tile_rows,
        n_init=n_init,
        n_local=n_local,
        num_kv_heads=num_kv_heads,
        target_programs=target,
    )
    assert work.items.dtype == work.merges.dtype == np.int32
    assert work.num_slots <= max_slots(num_kv_heads, target)
    seen: dict[int, list[int]] = {}
    slots: dict[int, list[int]] = {}
    heights: dict[int, int] = {}
    for request, first_row, num_rows, position, first_key, end_key, num_sinks, slot in work.items.tolist():
        assert 1 <= num_rows <= tile_rows
        span = next(s for s in band + tails if s.request == request)
        assert (span in tails) == (num_sinks == DENSE)
        assert 0 <= first_row - span.first_row <= span.num_rows - num_rows
        assert position - span.position == first_row - span.first_row
        for row in range(num_rows):
            i = position + row
            # The kernel's rule: sinks and the window's keys of the item's range, none of the future.
            window = n_local if num_sinks != DENSE else 2**31 - 1
            keys = list(range(min(max(num_sinks, 0), i + 1)))
            keys += range(max(first_key, i - window + 1), min(end_key, i + 1))
            seen.setdefault(first_row + row, []).extend(keys)
        if slot != WHOLE:
            slots.setdefault(first_row, []).append(slot)
            heights[first_row] = num_rows
    for span in band + tails:
        for row in range(span.num_rows):
            i = span.position + row
            expected = [j for j in range(i + 1) if span in tails or j < n_init or i - j < n_local]
            assert sorted(seen.pop(span.first_row + row)) == expected
    assert not seen
    merged = {row: list(range(first, first + count)) for row, _, first, count in work.merges.tolist()}
    assert merged == slots
    assert {row: rows for row, rows, _, _ in work.merges.tolist()} == heights
    assert sorted(slot for group in slots.values() for slot in group) == list(range(work.num_slots))


@pytest.mark.parametrize("tensor_parallel", [1, 2, 4, 8])
def test_the_tail_of_a_long_prompt_fills_the_device(tensor_parallel):
    """128K tokens of Llama-3.1-8B: at least two programs for each multiprocessor, all within 7% as long."""
    num_heads, num_kv_heads = 32 // tensor_parallel, 8 // tensor_parallel
    plan = build_plan(
        [0, 8192],
        [131072],
        [Request(131072)],
        pattern=Triangle(n_init=8, n_local=512, last_n=128),
        min_prompt_len=0,
        max_tail_rows=256,
    )
    assert [span.num_rows for span in plan.tails] == [128]
    work = cut_work(
        plan.triangle,
        plan.tails,
        tile_rows=tile_rows_for(num_heads, num_kv_heads, 128, 2),
        n_init=8,
        n_local=512,
        num_kv_heads=num_kv_heads,
        target_programs=4 * MULTIPROCESSORS,
    )
    tail = work.items[work.items[:, 6] == DENSE]
    assert 2 * MULTIPROCESSORS <= len(tail) * num_kv_heads <= 4 * MULTIPROCESSORS
    keys = tail[:, 5] - tail[:, 4]
    assert keys.sum() == 4 * 131072 - 32 * (1 + 2 + 3)
    assert np.median(keys) >= 0.93 * keys.max()
    # The long items start first.
    assert (np.diff(work.items[:, 6] != DENSE) >= 0).all()
