"""Tier A: the plan against a brute-force oracle, the keys that each query sees by the rule alone."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.plan.drawn import seeded_steps, steps
from tests.plan.oracle import complaint, dynamic_complaint, dynamic_truth, planned, truth
from tests.plan.step import Step
from tests.tiers import Tier
from vllm_trimix.plan import Plan, Span

PARTS = 9
"""Of the seeded cases, so that none takes minutes."""


def check(step: Step) -> None:
    """All three plans of a step, by the fast oracle."""
    for tails in (False, True):
        assert complaint(step, step.plan(tails=tails), tails=tails) is None
    assert dynamic_complaint(step, step.dynamic_plan()) is None


@pytest.mark.tier("A")
@pytest.mark.parametrize("part", range(PARTS))
def test_any_step_that_hypothesis_thinks_of(tier: Tier, part: int) -> None:
    """By both oracles where the prompts are short: the obvious one is the truth of the fast one."""
    wanted, checked = tier.size(sample=60, full=5_600), set()

    def one(step: Step) -> None:
        check(step)
        if step.pattern.n_local < 512:
            check_obviously(step)
        checked.add(step)
        tier.case("hypothesis", part, step, **step.facts())

    # It comes to some steps more than once, and to the simplest first in every round.
    while len(checked) < wanted:
        settings(max_examples=wanted - len(checked) + 30, deadline=None, database=None)(given(steps())(one))()


def check_obviously(step: Step) -> None:
    """All three plans of a step, row by row and key by key."""
    seen = truth(step)
    for tails in (False, True):
        assert planned(step, step.plan(tails=tails)) == seen
    sparse = {}
    for rows, num_keys in step.dynamic_plan().spans:
        sparse |= {rows.first_row + row: (rows.position + row, num_keys) for row in range(rows.num_rows)}
    assert sparse == dynamic_truth(step)


@pytest.mark.tier("A")
@pytest.mark.parametrize("part", range(PARTS))
def test_seeded_steps(tier: Tier, part: int) -> None:
    """Every other step arbitrary, the others those of a scheduler that caches, preempts and speculates."""
    for number, step in enumerate(seeded_steps(part, tier.size(sample=1_000, full=50_000))):
        check(step)
        tier.case("seeded", part, number, **step.facts())


def _damaged(plan: Plan, kind: str, number: int) -> Plan:
    """A plan that is wrong in one span, if it has one of the kind."""
    lists = {name: list(getattr(plan, name)) for name in ("triangle", "tails", "dense")}
    name = ("triangle", "tails", "dense")[number % 3]
    if lists[name]:
        place = number // 3 % len(lists[name])
        request, first_row, num_rows, position = lists[name][place]
        match kind:
            case "drop":
                del lists[name][place]
            case "shift":
                lists[name][place] = Span(request, first_row, num_rows, position + 1)
            case "shorten":
                lists[name][place] = Span(request, first_row, num_rows - 1, position)
            case "lengthen":
                lists[name][place] = Span(request, first_row, num_rows + 1, position)
            case "other":
                other = "dense" if name == "triangle" else "triangle"
                lists[other] = sorted([*lists[other], lists[name].pop(place)], key=lambda span: span.first_row)
    return dataclasses.replace(plan, **lists)


@settings(max_examples=500, deadline=None)
@given(steps(), st.sampled_from(["drop", "shift", "shorten", "lengthen", "other"]), st.integers(0, 20))
def test_the_fast_oracle_sees_what_the_obvious_one_sees(step: Step, kind: str, number: int) -> None:
    """Whatever plan shows some row other keys than the rule, the fast oracle complains of."""
    plan = _damaged(step.plan(tails=True), kind, number)
    if step.pattern.n_local < 512 and planned(step, plan) != truth(step):
        assert complaint(step, plan, tails=True) is not None


@pytest.mark.parametrize("kind", ["drop", "shift", "shorten", "lengthen", "other"])
def test_damage_is_found_often(kind: str) -> None:
    """The oracles disagree with wrong plans, or the test before proves nothing."""
    wrong = [
        planned(step, _damaged(step.plan(tails=True), kind, number)) != truth(step)
        for number, step in enumerate(seeded_steps(99, 300))
        if step.pattern.n_local < 512
    ]
    assert sum(wrong) >= 30
