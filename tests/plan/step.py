"""A step as the plan gets it, and the settings that it is planned under."""

from __future__ import annotations

from typing import NamedTuple

from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import DynamicPlan, Plan, Request, build_dynamic_plan, build_plan


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


def hidden_rows(step: Step, item: Scheduled) -> tuple[int, int]:
    """Positions [low, high) of a request's scheduled rows that hide some key; low >= high: none."""
    if step.whole(item):
        return 0, 0
    assert item.request is not None
    low = max(item.position, step.pattern.n_init + step.pattern.n_local)
    return low, min(item.end, item.request.prompt_len - step.pattern.last_n)
