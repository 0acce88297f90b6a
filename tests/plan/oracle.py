"""What a plan must say, from the rule alone: the obvious truth by row and key, and a fast one.

The obvious truth builds the set of keys of every row. The fast one knows that a row hides keys exactly from position
``n_init + n_local`` on and before the prompt's last rows, so that a request's rows are one interval;
``test_oracle`` holds it against the other, on damaged plans too. Neither looks at how the plan is made.
"""

from __future__ import annotations

from collections import Counter

from tests.plan.step import Scheduled, Step, hidden_rows
from vllm_trimix.plan import DynamicPlan, Plan, Span


def truth(step: Step) -> dict[int, set[int]]:
    """The keys that each row of the batch sees: the rule, word for word."""
    pattern, seen, row = step.pattern, {}, 0
    for item in step.batch:
        for i in range(item.position, item.end):
            dense = step.whole(item) or i >= item.request.prompt_len - pattern.last_n  # type: ignore[union-attr]
            seen[row] = {j for j in range(i + 1) if dense or j < pattern.n_init or i - j < pattern.n_local}
            row += 1
    return seen


def planned(step: Step, plan: Plan) -> dict[int, set[int]] | None:
    """The keys that a plan lets each row see; None where it plans a row twice, or another request's."""
    pattern, starts = step.pattern, step.starts
    seen: dict[int, set[int]] = {}
    for spans, sparse in ((plan.triangle, True), (plan.tails, False), (plan.dense, False)):
        for request, first_row, num_rows, position in spans:
            for row in range(first_row, first_row + num_rows):
                if row in seen or not starts[request] <= row < starts[request + 1]:
                    return None
                i = position + row - first_row
                seen[row] = {j for j in range(i + 1) if not sparse or j < pattern.n_init or i - j < pattern.n_local}
    return seen


def dynamic_truth(step: Step) -> dict[int, tuple[int, int]]:
    """Position, and end of the chunk's prompt rows, of each row that a dynamic pattern computes."""
    sparse: dict[int, tuple[int, int]] = {}
    row = 0
    for item in step.batch:
        request, rows = item.request, range(row, row + item.rows)
        row += item.rows
        if request is None or step.step_reason or request.dense_reason or request.dynamic_reason:
            continue
        end = min(request.prompt_len, item.end)
        body = [i for i in range(item.position, item.end) if i < request.prompt_len - step.pattern.last_n]
        if end >= step.min_seq_len and len(body) >= step.min_rows:
            sparse |= {place: (i, end) for place, i in zip(rows, body, strict=False)}
    return sparse


def complaint(step: Step, plan: Plan, *, tails: bool) -> str | None:
    """What is wrong with a plan, or None; in time that grows with the batch, not with its rows or keys."""
    hides_from = step.pattern.n_init + step.pattern.n_local
    kinds = (("triangle", plan.triangle), ("tail", plan.tails), ("dense", plan.dense))
    spans = _by_request(step, kinds)
    if isinstance(spans, str):
        return spans
    expected: Counter[str] = Counter()
    for item, own in zip(step.batch, spans, strict=True):
        low, high = hidden_rows(step, item)
        hidden = [(max(pos, hides_from), pos + rows) for kind, pos, rows in own if kind == "triangle"]
        hidden = [part for part in hidden if part[0] < part[1]]
        if hidden != ([(low, high)] if low < high else []):
            return f"{item}: rows {hidden} hide keys; the rule says [{low}, {high})"
        dense = [(kind, pos, rows) for kind, pos, rows in own if kind != "triangle"]
        if any(pos + rows != item.end for _, pos, rows in dense):
            return f"{item}: a dense span ends before its request's rows do: {dense}"
        rule = _classes(step, item, expected)
        first = max(item.position, item.request.prompt_len - step.pattern.last_n) if item.request and rule else 0
        may_be_tail = tails and rule and 0 < item.end - first <= step.max_tail_rows
        if [kind for kind, *_ in dense] != ([] if not dense else ["tail" if may_be_tail else "dense"]):
            return f"{item}: {dense}; a dense end of {item.end - first} rows, {step.max_tail_rows} may be a tail"
    return None if plan.rows == expected else f"counted {plan.rows}; the rule says {dict(expected)}"


def _classes(step: Step, item: Scheduled, expected: Counter[str]) -> bool:
    """Counts a request's rows by class; whether it is under the triangle's rule."""
    request = item.request
    if request is None:
        expected += Counter({"prompt_len_unknown": item.rows})
        return False
    prompt_rows = max(0, min(item.end, request.prompt_len) - item.position)
    expected += Counter({"decode": item.rows - prompt_rows})
    reason = step.step_reason or request.dense_reason
    if reason is None and (request.prompt_len < step.min_prompt_len or step.pattern.is_dense(request.prompt_len)):
        reason = "short_prompt"
    if reason is not None or not prompt_rows:
        expected += Counter({reason or "none": prompt_rows})
        return False
    body = max(0, min(item.end, request.prompt_len - step.pattern.last_n) - item.position)
    expected += Counter({"triangle": body, "last_n": prompt_rows - body})
    return True


def dynamic_complaint(step: Step, plan: DynamicPlan) -> str | None:
    """As ``complaint``, of the dynamic patterns' plan."""
    spans = _by_request(step, (("dynamic", [rows for rows, _ in plan.spans]), ("dense", plan.dense)))
    if isinstance(spans, str):
        return spans
    ends = {rows.request: num_keys for rows, num_keys in plan.spans}
    expected: Counter[str] = Counter()
    for index, (item, own) in enumerate(zip(step.batch, spans, strict=True)):
        body = _dynamic_classes(step, item, expected)
        sparse = [(pos, rows) for kind, pos, rows in own if kind == "dynamic"]
        if sparse != ([(item.position, body)] if body else []):
            return f"{item}: {sparse} are sparse, {body} rows should be"
        if body and item.request and ends[index] != min(item.end, item.request.prompt_len):
            return f"{item}: the choice looks from {ends[index]}"
        if any(pos + rows != item.end for kind, pos, rows in own if kind == "dense"):
            return f"{item}: a dense span ends before its request's rows do: {own}"
    return None if plan.rows == expected else f"counted {plan.rows}; expected {dict(expected)}"


def _dynamic_classes(step: Step, item: Scheduled, expected: Counter[str]) -> int:
    """Counts a request's rows by class; how many a dynamic pattern computes."""
    request = item.request
    if request is None:
        expected += Counter({"prompt_len_unknown": item.rows})
        return 0
    end = min(item.end, request.prompt_len)
    prompt_rows = max(0, end - item.position)
    expected += Counter({"decode": item.rows - prompt_rows})
    body = max(0, min(item.end, request.prompt_len - step.pattern.last_n) - item.position)
    reason = step.step_reason or request.dense_reason or request.dynamic_reason
    if reason is None and end < step.min_seq_len:
        reason = "few_keys" if request.prompt_len >= step.min_seq_len else "short_prompt"
    if reason is None and body and body < step.min_rows:
        reason = "short_chunk"
    if reason is not None or not prompt_rows:
        expected += Counter({reason or "none": prompt_rows})
        return 0
    expected += Counter({"dynamic": body, "last_n": prompt_rows - body})
    return body


def _by_request(step: Step, kinds: tuple[tuple[str, list[Span]], ...]) -> list[list[tuple[str, int, int]]] | str:
    """Kind, position and rows of each request's spans, by row; a message where they don't cover each row once."""
    starts = step.starts
    found: list[list[tuple[int, str, int, int]]] = [[] for _ in step.batch]
    for kind, spans in kinds:
        if [span.first_row for span in spans] != sorted(span.first_row for span in spans):
            return f"{kind} spans are out of order: {spans}"
        for request, first_row, num_rows, position in spans:
            if position - first_row != step.batch[request].position - starts[request]:
                return f"{kind} rows from {first_row} of request {request} are at {position}"
            found[request].append((first_row, kind, position, num_rows))
    for index, own in enumerate(found):
        own.sort()
        row = starts[index]
        for first_row, kind, _, num_rows in own:
            if first_row != row or num_rows <= 0:
                return f"{kind} rows {first_row} to {first_row + num_rows} of request {index}, {row} was to come"
            row += num_rows
        if row != starts[index + 1]:
            return f"rows {row} to {starts[index + 1]} of request {index} are planned nowhere"
    return [[(kind, position, rows) for _, kind, position, rows in own] for own in found]
