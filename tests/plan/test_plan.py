"""The plan by example; any step at all is in ``test_oracle``."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import DynamicSpan, Request, Span, build_dynamic_plan, build_plan


@settings(max_examples=300, deadline=None)
@given(
    st.integers(1, 60),
    st.lists(st.integers(1, 20), min_size=1, max_size=20),
    st.integers(0, 5),
    st.integers(1, 9),
    st.integers(0, 9),
)
def test_chunking_changes_nothing(prompt_len: int, chunks: list[int], n_init: int, n_local: int, last_n: int) -> None:
    pattern = Triangle(n_init, n_local, last_n)

    def rows(sizes: list[int]) -> list[str]:
        classes, position = [], 0
        for size in sizes:
            size = min(size, prompt_len - position)
            if size <= 0:
                break
            plan = build_plan([0, size], [position + size], [Request(prompt_len)], pattern=pattern, min_prompt_len=0)
            chunk = ["dense"] * size
            for _, first_row, num_rows, _ in plan.triangle:
                chunk[first_row : first_row + num_rows] = ["triangle"] * num_rows
            classes += chunk
            position += size
        return classes

    whole = rows([prompt_len])
    cut = rows(chunks)
    assert cut == whole[: len(cut)]


def test_last_rows_are_the_prompts_not_the_chunks() -> None:
    pattern = Triangle(n_init=2, n_local=4, last_n=8)
    plan = build_plan([0, 50], [150], [Request(200)], pattern=pattern, min_prompt_len=0)
    assert plan.triangle == [Span(0, 0, 50, 100)]
    assert plan.dense == []
    plan = build_plan([0, 50], [195], [Request(200)], pattern=pattern, min_prompt_len=0)
    assert plan.triangle == [Span(0, 0, 47, 145)]
    assert plan.dense == [Span(0, 47, 3, 192)]
    assert plan.rows == {"triangle": 47, "last_n": 3}


def test_without_a_limit_the_stock_kernel_has_every_dense_end() -> None:
    plan = build_plan([0, 50], [193], [Request(200)], pattern=Triangle(2, 4, 8), min_prompt_len=0)
    assert (plan.tails, plan.dense) == ([], [Span(0, 49, 1, 192)])


def test_resumed_request_recomputes_prompt_rows_under_the_rule_and_generated_rows_densely() -> None:
    pattern = Triangle(n_init=2, n_local=4, last_n=8)
    plan = build_plan([0, 120], [120], [Request(100)], pattern=pattern, min_prompt_len=0)
    assert plan.triangle == [Span(0, 0, 92, 0)]
    assert plan.dense == [Span(0, 92, 28, 92)]
    assert plan.rows == {"triangle": 92, "last_n": 8, "decode": 20}


@pytest.mark.parametrize(("prompt_len", "sparse"), [(13, False), (14, False), (15, True)])
def test_prompts_that_the_pattern_cannot_thin_are_dense(prompt_len: int, sparse: bool) -> None:
    pattern = Triangle(n_init=2, n_local=4, last_n=8)
    plan = build_plan([0, prompt_len], [prompt_len], [Request(prompt_len)], pattern=pattern, min_prompt_len=0)
    assert bool(plan.triangle) is sparse
    assert pattern.is_dense(prompt_len) is not sparse
    positions = torch.arange(prompt_len)
    hidden = ~pattern.mask(positions, positions, prompt_len) & (positions[:, None] >= positions)
    assert bool(hidden.any()) is sparse


def test_threshold_and_step_reasons_are_counted() -> None:
    pattern = Triangle(n_init=1, n_local=2, last_n=3)
    step = ([0, 40, 41], [40, 91], [Request(40), Request(80)])
    assert build_plan(*step, pattern=pattern, min_prompt_len=41).rows == {"short_prompt": 40, "decode": 1}
    assert build_plan(*step, pattern=pattern, min_prompt_len=40).rows == {"triangle": 37, "last_n": 3, "decode": 1}
    plan = build_plan(*step, pattern=pattern, min_prompt_len=0, step_reason="graph_replay")
    assert plan.rows == {"graph_replay": 40, "decode": 1}
    assert plan.triangle == []


@given(prompt_len=st.integers(1, 80), n_init=st.integers(0, 9), n_local=st.integers(1, 20), last_n=st.integers(0, 90))
def test_visible_pairs_are_those_of_the_mask(prompt_len: int, n_init: int, n_local: int, last_n: int) -> None:
    pattern = Triangle(n_init=n_init, n_local=n_local, last_n=last_n)
    positions = torch.arange(prompt_len)
    assert pattern.visible_pairs(prompt_len) == int(pattern.mask(positions, positions, prompt_len).sum())


@pytest.mark.parametrize(("max_tail_rows", "is_tail"), [(0, False), (127, False), (128, True), (256, True)])
def test_short_dense_ends_are_tails(max_tail_rows: int, is_tail: bool) -> None:
    """Of requests under the rule only: others stay whole with the stock kernel, decodes too."""
    requests = [Request(2000), Request(50), Request(2000, "opt_out"), Request(100)]
    plan = build_plan(
        [0, 1000, 1010, 1020, 1021],
        [2000, 10, 2000, 101],
        requests,
        pattern=Triangle(n_init=8, n_local=512, last_n=128),
        min_prompt_len=0,
        max_tail_rows=max_tail_rows,
    )
    tail = Span(0, 872, 128, 1872)
    assert plan.triangle == [Span(0, 0, 872, 1000)]
    assert plan.tails == ([tail] if is_tail else [])
    assert [span.request for span in plan.dense] == ([] if is_tail else [0]) + [1, 2, 3]
    assert plan.rows["last_n"] == 128


def test_a_resumed_answer_is_no_tail() -> None:
    """Rows that a preemption made it compute again can be many: the stock kernel's."""
    plan = build_plan(
        [0, 1000],
        [2500],
        [Request(2000)],
        pattern=Triangle(n_init=8, n_local=512, last_n=128),
        min_prompt_len=0,
        max_tail_rows=256,
    )
    assert (plan.tails, plan.dense) == ([], [Span(0, 372, 628, 1872)])


def test_the_choice_looks_from_the_chunks_last_prompt_row() -> None:
    """The prompt's last rows are dense, and yet the pattern's choice is theirs: they ask the question."""
    plan = build_dynamic_plan([0, 50], [150], [Request(148)], last_n=10, min_seq_len=0, min_rows=8)
    assert plan.spans == [DynamicSpan(Span(0, 0, 38, 100), 148)]
    assert plan.dense == [Span(0, 38, 12, 138)]
    assert plan.rows == {"decode": 2, "dynamic": 38, "last_n": 10}


@pytest.mark.parametrize(
    ("prompt_len", "min_seq_len", "min_rows", "reason"),
    [
        pytest.param(149, 150, 1, "short_prompt", id="prompt"),
        pytest.param(400, 151, 1, "few_keys", id="early_chunk"),
        pytest.param(400, 150, 51, "short_chunk", id="short_chunk"),
        pytest.param(400, 150, 50, "dynamic", id="sparse"),
    ],
)
def test_why_a_chunk_stays_dense(prompt_len: int, min_seq_len: int, min_rows: int, reason: str) -> None:
    end = min(prompt_len, 150)
    plan = build_dynamic_plan(
        [0, 50], [end], [Request(prompt_len)], last_n=0, min_seq_len=min_seq_len, min_rows=min_rows
    )
    assert plan.rows == {reason: 50}
