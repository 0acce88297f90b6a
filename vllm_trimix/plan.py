"""The per-step schedule: which query rows the sparse kernels compute, which stay dense, and why.

Built once per step on the CPU from plain integers; shared by all layers; no vLLM types and no tensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm_trimix.patterns.triangle import Triangle

DECODE = "decode"
"""Rows at or past the prompt's end: dense by the rule, not a fallback."""
LAST_N = "last_n"
"""The prompt's last rows: dense by the rule, not a fallback."""
FEW_KEYS = "few_keys"
"""Early rows of a long prompt, where a dynamic pattern hides too little to pay: dense by the rule."""


class Request(NamedTuple):
    """What the plan needs to know of one scheduled request.

    Attributes:
        prompt_len: Prompt tokens as first submitted.
        dense_reason: Why the whole request stays dense, or None.
        dynamic_reason: Why it stays dense in the layers of dynamic patterns only, or None.
    """

    prompt_len: int
    dense_reason: str | None = None
    dynamic_reason: str | None = None


class Span(NamedTuple):
    """A contiguous range of query rows of one request under one mask rule.

    Attributes:
        request: Row of the request in the batch (its block-table row).
        first_row: First query row in the batch.
        num_rows: Query rows.
        position: Absolute position of the first row in the request.
    """

    request: int
    first_row: int
    num_rows: int
    position: int


@dataclass
class Plan:
    """One step's schedule.

    Attributes:
        triangle: Spans the triangle kernel computes; without any, and without tails, the whole step is dense.
        tails: Dense spans of the last prompt rows, few against many keys: the triangle kernel computes them too, with
            their keys split.
        dense: Spans left to the stock kernel. Each ends at the end of its request's scheduled rows.
        rows: Query rows by class: ``triangle``, ``last_n``, ``decode`` and each fallback reason.
    """

    triangle: list[Span] = field(default_factory=list)
    tails: list[Span] = field(default_factory=list)
    dense: list[Span] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)


class DynamicSpan(NamedTuple):
    """Rows that a dynamic pattern computes.

    Attributes:
        rows: The rows.
        num_keys: Keys up to the chunk's last prompt row, which may be one of the prompt's last rows and dense itself;
            the pattern's choice looks from there.
    """

    rows: Span
    num_keys: int


@dataclass
class DynamicPlan:
    """One step's schedule in the layers of dynamic patterns.

    Attributes:
        spans: Rows that the patterns compute; without any the whole step is dense.
        dense: Spans left to the stock kernel. Each ends at the end of its request's scheduled rows.
        rows: Query rows by class: ``dynamic``, ``last_n``, ``decode``, ``few_keys`` and each fallback reason.
    """

    spans: list[DynamicSpan] = field(default_factory=list)
    dense: list[Span] = field(default_factory=list)
    rows: dict[str, int] = field(default_factory=dict)


def build_plan(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    requests: Sequence[Request | None],
    *,
    pattern: Triangle,
    min_prompt_len: int,
    max_tail_rows: int = 0,
    step_reason: str | None = None,
) -> Plan:
    """Splits a step's query rows into triangle spans and the dense remainder.

    Args:
        query_start_loc: First row of each request and the end, [num_requests + 1].
        seq_lens: Keys of each request after this step, [num_requests]; exact for rows below the prompt's end.
        requests: Each request's prompt length and fallback reason; None when the prompt length is unknown.
        pattern: The triangle's parameters.
        min_prompt_len: Prompts shorter than this stay dense.
        max_tail_rows: Dense spans of sparse requests up to this long are ``tails``; 0 leaves all to the stock kernel.
        step_reason: Why no request of this step may be sparse, or None.

    Returns:
        The plan. Rows of padding requests (no query rows) appear nowhere.
    """
    plan = Plan()
    triangle, dense, rows = plan.triangle, plan.dense, plan.rows
    last_n, dense_len = pattern.last_n, max(pattern.dense_len, min_prompt_len - 1)
    for span, request in _prompt_spans(query_start_loc, seq_lens, requests, plan):
        index, first_row, num_rows, position = span
        prompt_len = request.prompt_len
        prompt_rows = min(num_rows, prompt_len - position)
        reason = step_reason or request.dense_reason or ("short_prompt" if prompt_len <= dense_len else None)
        if reason is not None:
            dense.append(span)
            rows[reason] = rows.get(reason, 0) + prompt_rows
            continue
        body = max(0, min(prompt_rows, prompt_len - last_n - position))
        if body:
            triangle.append(Span(index, first_row, body, position))
            rows["triangle"] = rows.get("triangle", 0) + body
        if body < num_rows:
            rest = dense if num_rows - body > max_tail_rows else plan.tails
            rest.append(Span(index, first_row + body, num_rows - body, position + body))
        if body < prompt_rows:
            rows[LAST_N] = rows.get(LAST_N, 0) + prompt_rows - body
    return plan


def build_dynamic_plan(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    requests: Sequence[Request | None],
    *,
    last_n: int,
    min_seq_len: int,
    min_rows: int,
    step_reason: str | None = None,
) -> DynamicPlan:
    """Splits a step's query rows into those of a dynamic pattern and the dense remainder.

    Args:
        query_start_loc: First row of each request and the end, [num_requests + 1].
        seq_lens: Keys of each request after this step, [num_requests]; exact for rows below the prompt's end.
        requests: Each request's prompt length and fallback reasons; None when the prompt length is unknown.
        last_n: The prompt's last rows, which stay dense.
        min_seq_len: Chunks that end at fewer prompt tokens stay dense.
        min_rows: Chunks with fewer rows before the last ones stay dense: choosing would cost what it saves.
        step_reason: Why no request of this step may be sparse, or None.

    Returns:
        The plan. Rows of padding requests (no query rows) appear nowhere.
    """
    plan = DynamicPlan()
    rows = plan.rows
    for span, request in _prompt_spans(query_start_loc, seq_lens, requests, plan):
        index, first_row, num_rows, position = span
        prompt_rows = min(num_rows, request.prompt_len - position)
        body = max(0, min(prompt_rows, request.prompt_len - last_n - position))
        reason = step_reason or request.dense_reason or request.dynamic_reason
        if reason is None and position + prompt_rows < min_seq_len:
            reason = "short_prompt" if request.prompt_len < min_seq_len else FEW_KEYS
        if reason is None and 0 < body < min_rows:
            reason = "short_chunk"
        if reason is not None:
            plan.dense.append(span)
            rows[reason] = rows.get(reason, 0) + prompt_rows
            continue
        if body:
            plan.spans.append(DynamicSpan(Span(index, first_row, body, position), position + prompt_rows))
            rows["dynamic"] = rows.get("dynamic", 0) + body
        if body < num_rows:
            plan.dense.append(Span(index, first_row + body, num_rows - body, position + body))
        if body < prompt_rows:
            rows[LAST_N] = rows.get(LAST_N, 0) + prompt_rows - body
    return plan


def _prompt_spans(
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    requests: Sequence[Request | None],
    plan: Plan | DynamicPlan,
) -> Iterator[tuple[Span, Request]]:
    """The scheduled rows of each request that has prompt rows among them; counts and plans all others as dense."""
    dense, rows = plan.dense, plan.rows
    for index, request in enumerate(requests):
        first_row = query_start_loc[index]
        num_rows = query_start_loc[index + 1] - first_row
        if num_rows <= 0:
            continue
        position = seq_lens[index] - num_rows
        span = Span(index, first_row, num_rows, position)
        if request is None:
            dense.append(span)
            rows["prompt_len_unknown"] = rows.get("prompt_len_unknown", 0) + num_rows
        elif position >= request.prompt_len:
            dense.append(span)
            rows[DECODE] = rows.get(DECODE, 0) + num_rows
        else:
            generated = position + num_rows - request.prompt_len
            if generated > 0:
                rows[DECODE] = rows.get(DECODE, 0) + generated
            yield span, request
