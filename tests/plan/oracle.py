"""What a plan must say, from the rule alone: steps of every kind, the obvious truth by row and key, and a fast one.

The obvious truth builds the set of keys of every row. The fast one knows that a row hides keys exactly from position
``n_init + n_local`` on and before the prompt's last rows, so that a request's rows are one interval;
``test_oracle`` holds it against the other, on damaged plans too. Neither looks at how the plan is made.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

from hypothesis import strategies as st

from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import DynamicPlan, Plan, Request, Span, build_dynamic_plan, build_plan

# Draws from [low, high], and one of some values.
Draw = Callable[[int, int], int]

_REASONS = (None, None, None, None, "opt_out", "prompt_logprobs")
_DYNAMIC_REASONS = (None, None, None, "opt_out_dynamic")


class Scheduled(NamedTuple):
    """One row of a step's batch.

    Attributes:
        request: As the plan gets it; None: its prompt length is unknown, or it pads the batch.
        position: Absolute position of its first scheduled row.
        rows: Scheduled rows, 0 where it pads.
        cached: Whether this is the request's first step and ``position`` the end of what a cache held.
        resumed: Whether it computes again what a preemption threw away.
    """

    request: Request | None
    position: int
    rows: int
    cached: bool = False
    resumed: bool = False

    @property
    def end(self) -> int:
        return self.position + self.rows


class Step(NamedTuple):
    """A step, and the settings that it is planned under."""

    batch: tuple[Scheduled, ...]
    pattern: Triangle
    min_prompt_len: int
    max_tail_rows: int
    min_seq_len: int
    min_rows: int
    step_reason: str | None

    @property
    def starts(self) -> list[int]:
        starts = [0]
        for item in self.batch:
            starts.append(starts[-1] + item.rows)
        return starts

    @property
    def lens(self) -> list[int]:
        return [item.end for item in self.batch]

    @property
    def requests(self) -> list[Request | None]:
        return [item.request for item in self.batch]

    def plan(self, *, tails: bool) -> Plan:
        """The triangle's plan, with and without tails."""
        return build_plan(
            self.starts,
            self.lens,
            self.requests,
            pattern=self.pattern,
            min_prompt_len=self.min_prompt_len,
            max_tail_rows=self.max_tail_rows if tails else 0,
            step_reason=self.step_reason,
        )

    def dynamic_plan(self) -> DynamicPlan:
        """The dynamic patterns' plan."""
        return build_dynamic_plan(
            self.starts,
            self.lens,
            self.requests,
            last_n=self.pattern.last_n,
            min_seq_len=self.min_seq_len,
            min_rows=self.min_rows,
            step_reason=self.step_reason,
        )

    def whole(self, item: Scheduled) -> bool:
        """Whether a request is dense as a whole, whatever its rows."""
        request = item.request
        return (
            request is None
            or self.step_reason is not None
            or request.dense_reason is not None
            or request.prompt_len < self.min_prompt_len
        )

    def facts(self) -> dict[str, bool]:
        """What ``tests.tiers`` counts."""
        facts = dict.fromkeys(("triangle", "straddling", "cached", "resumed"), False)
        for item in self.batch:
            if item.request is None or item.rows == 0:
                continue
            prompt_len, last_n = item.request.prompt_len, self.pattern.last_n
            low, high = hidden_rows(self, item)
            facts["triangle"] |= low < high
            edges = (item.position, item.end)
            facts["straddling"] |= any(max(0, prompt_len - last_n) < edge < prompt_len for edge in edges)
            facts["cached"] |= item.cached and 0 < item.position < prompt_len
            facts["resumed"] |= item.resumed
        return facts


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
    sparse, row = {}, 0
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


def hidden_rows(step: Step, item: Scheduled) -> tuple[int, int]:
    """Positions [low, high) of a request's scheduled rows that hide some key; low >= high: none."""
    if step.whole(item):
        return 0, 0
    assert item.request is not None
    low = max(item.position, step.pattern.n_init + step.pattern.n_local)
    return low, min(item.end, item.request.prompt_len - step.pattern.last_n)


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


def _settings(draw: Draw) -> tuple[Triangle, int, int, int, int]:
    """The pattern, min_prompt_len, max_tail_rows, min_seq_len and min_rows: tiny, or those that are served."""
    if draw(0, 7) == 0:
        return Triangle(8, 512, 128), (0, 640, 4096)[draw(0, 2)], (0, 127, 128, 256)[draw(0, 3)], 4096, 64
    pattern = Triangle(n_init=draw(0, 6), n_local=draw(1, 9), last_n=draw(0, 7))
    return pattern, (0, 0, 12, 30)[draw(0, 3)], draw(0, 9), (0, 0, 12, 30)[draw(0, 3)], draw(1, 12)


def _near(draw: Draw, places: tuple[int, ...], low: int, high: int) -> int:
    """Anywhere in [low, high], or within one of some place."""
    if draw(0, 1):
        return draw(low, max(low, high))
    return min(max(low, high), max(low, places[draw(0, len(places) - 1)] + draw(-1, 1)))


def arbitrary_step(draw: Draw) -> Step:
    """Requests that know nothing of each other, with every border where the rule changes hit on purpose."""
    pattern, min_prompt_len, *rest = _settings(draw)
    longest = 3 * pattern.dense_len + 30
    batch = []
    for _ in range(draw(1, 6)):
        prompt_len = _near(draw, (pattern.dense_len, min_prompt_len, rest[1]), 1, longest)
        borders = (prompt_len - pattern.last_n, prompt_len, pattern.n_init + pattern.n_local, rest[1])
        request = Request(prompt_len, _REASONS[draw(0, 5)], _DYNAMIC_REASONS[draw(0, 3)])
        kind = draw(0, 7)
        if kind == 0:  # Decode, or drafts to verify.
            item = Scheduled(request, prompt_len + draw(0, 9), draw(1, 6))
        elif kind == 1:  # Padding.
            item = Scheduled(request if draw(0, 1) else None, 0, 0)
        elif kind == 2:  # Of another kind of request, whose prompt length nobody knows.
            item = Scheduled(None, draw(0, longest), draw(1, 9))
        elif kind == 3:  # Resumed: all that was computed, or what the cache has lost of it.
            position = _near(draw, borders, 0, prompt_len - 1) if draw(0, 1) else 0
            end = _near(draw, borders, position + 1, prompt_len + draw(1, 20))
            item = Scheduled(request, position, end - position, cached=position > 0, resumed=True)
        else:  # A chunk of the prompt, its first perhaps behind cached rows.
            position = _near(draw, borders, 0, prompt_len - 1)
            end = _near(draw, borders, position + 1, prompt_len)
            item = Scheduled(request, position, end - position, cached=kind > 5 and position > 0)
        batch.append(item)
    reason = "graph_replay" if draw(0, 19) == 0 else None
    return Step(tuple(batch), pattern, min_prompt_len, *rest, reason)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """``arbitrary_step`` by hypothesis, which shrinks what fails."""
    return arbitrary_step(lambda low, high: draw(st.integers(low, high)))


class _Life:
    """A request from admission to its last token, as a scheduler sees it."""

    def __init__(self, rng: random.Random, prompt_len: int, block_size: int) -> None:
        self.request = Request(prompt_len, rng.choice(_REASONS), rng.choice(_DYNAMIC_REASONS))
        self.tokens, self.last = prompt_len, prompt_len + rng.randint(1, 12)
        self.resumed = False
        self.enter(rng, block_size)

    def enter(self, rng: random.Random, block_size: int) -> None:
        """Waits again; whole blocks before the last token may be cached."""
        hit = rng.randint(0, (self.tokens - 1) // block_size) if rng.random() < 0.4 else 0
        self.computed = hit * block_size
        self.cached = hit > 0


def scheduled_steps(seed: int) -> Iterator[Step]:
    """The steps of a scheduler: chunks by a budget of tokens, cache hits, preemptions, drafts, padding."""
    rng = random.Random(seed)
    draw = rng.randint
    pattern, min_prompt_len, *rest = _settings(draw)
    longest, block_size = 3 * pattern.dense_len + 30, rng.choice((1, 4, 16))
    budget = rng.choice((3, 8, 17, 64)) if pattern.n_local < 512 else rng.choice((256, 1000, 2048))
    places = (pattern.dense_len, min_prompt_len, rest[1])
    lives = [_Life(rng, _near(draw, places, 1, longest), block_size) for _ in range(draw(1, 5))]
    drafts, padding = draw(0, 3), draw(0, 2)
    while lives:
        left, batch, running = budget, [], []
        for life in lives:
            missing = life.tokens - life.computed
            # The first drafts come with the first decode.
            extra = draw(0, drafts) if missing == 1 and life.tokens > life.request.prompt_len else 0
            rows = min(left, missing + extra)
            if rows:
                batch.append(Scheduled(life.request, life.computed, rows, life.cached, life.resumed))
                running.append((life, rows, extra))
                left -= rows
        pads = (Scheduled(None, 0, 0),) * padding
        yield Step((*batch, *pads), pattern, min_prompt_len, *rest, None)
        for life, rows, extra in running:
            life.cached = False
            if life.computed + rows < life.tokens:
                life.computed += rows
                continue
            # All of the known tokens, and of the drafts some that were right.
            accepted = draw(0, rows - (life.tokens - life.computed)) if extra else 0
            life.computed, life.tokens = life.tokens + accepted, life.tokens + accepted + 1
            life.resumed = False
        lives = [life for life in lives if life.tokens <= life.last]
        if lives and rng.random() < 0.15:
            victim = lives.pop()
            victim.resumed = True
            victim.enter(rng, block_size)
            lives.append(victim)


def seeded_steps(seed: int, count: int) -> Iterator[Step]:
    """``count`` steps: every other one arbitrary, the others those of schedulers, one after the other."""
    rng = random.Random(seed)
    runs = 0
    scheduled: Iterator[Step] = iter(())
    for number in range(count):
        if number % 2:
            yield arbitrary_step(rng.randint)
            continue
        step = next(scheduled, None)
        while step is None:
            scheduled = scheduled_steps(seed * 2**32 + runs)
            runs += 1
            step = next(scheduled, None)
        yield step
