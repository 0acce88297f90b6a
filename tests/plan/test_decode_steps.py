"""A step without prompts costs nothing: planned once for all KV-cache groups, and not request by request."""

from __future__ import annotations

from collections.abc import Callable
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
    planned.step.begin(
        mock.Mock(finished_req_ids=(), scheduled_new_reqs=(), spec=["finished_req_ids", "scheduled_new_reqs"])
    )
    assert planned.step.plans == {}
