"""A step without prompts costs nothing: planned once for all KV-cache groups, and not request by request."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

pytest.importorskip("vllm", reason="the builder is vLLM's")

from benchmarks.benchmark_overhead import PlannedStep, planned_step
from vllm_trimix.backend import builder
from vllm_trimix.demo.bench_model import SHAPES, make_bench_model

Make = Callable[..., PlannedStep]


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Make:
    model = tmp_path_factory.mktemp("model") / "bench"
    make_bench_model(model, SHAPES["bench-8l"])

    def planned(**batch: int) -> PlannedStep:
        return planned_step(model, **batch)

    return planned


def test_a_step_of_decodes_looks_at_no_request(make: Make) -> None:
    planned = make(num_requests=300, num_prefill=0)
    with mock.patch.object(builder, "build_plan", side_effect=AssertionError("planned request by request")):
        metadata = planned.build()
    assert metadata.trimix is None
    assert planned.step.stats.snapshot()["decode"] == 300
    assert planned.step.stats.steps == 1


def test_both_ways_count_the_same(make: Make) -> None:
    """Whether vLLM says that all decode, or doesn't say: the rows are the same."""
    planned = make(num_requests=20, num_prefill=0)
    planned.build()
    planned.common.is_prefilling = None
    with mock.patch.object(builder, "build_plan", wraps=builder.build_plan) as build_plan:
        planned.build()
    assert build_plan.call_count == 1
    assert planned.step.stats.snapshot()["decode"] == 40
    assert set(planned.step.stats.rows) == {"decode"}


def test_one_prompt_among_decodes_is_planned(make: Make) -> None:
    planned = make(num_requests=20, num_prefill=1)
    metadata = planned.build()
    assert [span.num_rows for span in metadata.trimix.spans] == [512 - 128]
    assert planned.step.stats.rows == {"decode": 19, "triangle": 384, "last_n": 128}


def test_groups_share_a_step_plan(make: Make) -> None:
    """A model with several KV-cache groups builds metadata for each of them in a step."""
    planned = make(num_requests=20, num_prefill=2)
    with mock.patch.object(builder, "build_plan", wraps=builder.build_plan) as build_plan:
        planned.build()
        second = planned.build(fresh=False)
    assert build_plan.call_count == 1
    assert len(second.trimix.spans) == 2
    assert planned.step.stats.steps == 1
    planned.step.begin(scheduled("a"))
    assert planned.step.plans == {}


def scheduled(*ids: str) -> Any:
    """What a scheduler says of a step in which nothing is new."""
    return SimpleNamespace(finished_req_ids=(), scheduled_new_reqs=(), num_scheduled_tokens=dict.fromkeys(ids, 1))


def test_the_runners_own_warm_up_is_planned_but_not_counted(make: Make) -> None:
    planned = make(num_requests=20, num_prefill=2)
    for name in ("_warmup_0_", "_v2_mixed_warmup_decode_"):
        planned.step.begin(scheduled(name))
        metadata = planned.build(fresh=False)
        assert len(metadata.trimix.spans) == 2
        # As a layer does.
        metadata.trimix.stats.triangle_layer_rows += 7
        planned.step.end()
        snapshot = planned.step.stats.snapshot()
        assert (snapshot["steps"], snapshot["triangle_layer_rows"]) == (0, 0)
        assert not planned.step.stats.rows
    planned.step.begin(scheduled("cmpl-_warmup_0_"))
    planned.build(fresh=False)
    planned.step.end()
    assert planned.step.stats.steps == 1
    assert planned.step.stats.rows["triangle"] > 0
