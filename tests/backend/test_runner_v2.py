"""Request tracking on model runner V2: its real ``execute_model``, states and scheduler messages."""

from __future__ import annotations

from typing import Any

import pytest

from tests.backend import test_cuda_composition
from tests.backend.report import DENSE, crash, wrong_counts, wrong_notes, wrong_rows, wrong_tracking

SCENARIOS = (
    "preempted_and_resumed",
    "ids_reused",
    "dummy_runs",
    "streaming_input",
    "single_rows_with_graphs",
    "single_rows_without_graphs",
    "verified_drafts",
)


@pytest.fixture(params=[f"{dense}-{name}" for dense in DENSE for name in SCENARIOS])
def result(request: pytest.FixtureRequest, report: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = report["scenarios"][request.param]
    assert not crash(found), crash(found)
    return found


def test_rows_match_their_definition(result: dict[str, Any]) -> None:
    assert wrong_rows(result) == []


def test_every_row_is_counted_in_its_class(result: dict[str, Any]) -> None:
    assert wrong_counts(result) == []


def test_scenario_was_what_it_says(result: dict[str, Any]) -> None:
    assert wrong_notes(result) == []


def test_tracks_the_requests_that_are_alive(report: dict[str, Any]) -> None:
    wrong = {name: wrong_tracking(found) for name, found in report["scenarios"].items() if not crash(found)}
    assert {name: problems for name, problems in wrong.items() if problems} == {}


def test_no_scenario_is_left_out(report: dict[str, Any]) -> None:
    names = {f"{dense}-{name}" for dense in DENSE for name in (*SCENARIOS, *test_cuda_composition.SCENARIOS)}
    assert set(report["scenarios"]) == names


def test_both_runners_are_wrapped_once(report: dict[str, Any]) -> None:
    runners = report["runners"]
    assert runners["wrapped"] == [True, True]
    assert runners["once"]


def test_runner_arguments_are_where_the_wrapper_looks(report: dict[str, Any]) -> None:
    """``dummy_run`` is V2's third argument; V1 has none."""
    v1, v2 = report["runners"]["parameters"]
    assert v1 == ["self", "scheduler_output", "intermediate_tensors"]
    assert v2 == ["self", "scheduler_output", "intermediate_tensors", "dummy_run"]


def test_next_version_is_the_one_driven(reports: Any) -> None:
    assert reports("0.33")["runners"]["vllm"].startswith("0.33")
