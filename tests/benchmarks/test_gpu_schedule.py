"""Which of the GPU run's stages run side by side, which alone, and what a budget leaves: on stages that do nothing."""

from __future__ import annotations

import pytest

from tests.benchmarks.trivial import Trivial


def test_a_budget_leaves_what_does_not_fit(trivial: Trivial) -> None:
    status, out = trivial.run("good,bad", "--budget=4")
    assert status == 0, out
    assert "left: good, bad" in out
    assert "| good | left |" in (trivial.output / "summary.md").read_text()
    # A stage never runs past the budget.
    status, _ = trivial.run("hangs", "--budget=7")
    assert trivial.result("hangs")["status"] == "timeout"
    assert trivial.result("hangs")["seconds"] < 20


def test_stages_run_side_by_side_where_they_may(trivial: Trivial) -> None:
    status, out = trivial.run("b1,b2,good", "--jobs=2")
    assert status == 0, out
    at = trivial.marks()
    assert max(at["b1", "starts"], at["b2", "starts"]) < min(at["b1", "ends"], at["b2", "ends"])
    # What must be alone starts when both have ended.
    assert out.index("good: started") > max(out.index("b1: passed"), out.index("b2: passed"))
    trivial.run("b1,b2", "--jobs=1", "--toy")
    at = trivial.marks()
    assert at["b2", "starts"] > at["b1", "ends"]


def test_a_prepared_stage_has_the_device_to_itself(trivial: Trivial) -> None:
    status, out = trivial.run("p1,b1,p2", "--jobs=3", BESIDE_SECONDS="3")
    assert status == 0, out
    at = trivial.marks()
    assert max(at["p1", "prepares"], at["p2", "prepares"]) < at["b1", "ends"]
    order = [at["b1", "ends"], at["p1", "starts"], at["p1", "ends"], at["p2", "starts"]]
    assert order == sorted(order)
    first, second = trivial.result("p1"), trivial.result("p2")
    assert first["granted"] == 60
    assert first["device_seconds"] == pytest.approx(0.5, abs=0.3)
    # Waiting for the others is not its time.
    assert second["waited_seconds"] > 0.5
    assert second["seconds"] < at["p2", "ends"] - at["p2", "prepares"]


def test_a_prepared_stage_is_ended_in_either_phase(trivial: Trivial) -> None:
    status, _ = trivial.run("p1", PREPARE_SECONDS="60")
    assert (status, trivial.result("p1")["status"]) == (1, "timeout")
    assert "ended after 6 s" in trivial.result("p1")["seen"]
    status, _ = trivial.run("p1,b1", ALONE_SECONDS="60", LIMIT="9", BESIDE_SECONDS="4")
    assert trivial.result("p1")["status"] == "timeout"
    assert "ended after 9 s; 1 checks had passed" in trivial.result("p1")["seen"]
    assert trivial.result("b1")["status"] == "passed"


def test_time_is_kept_for_what_is_prepared(trivial: Trivial) -> None:
    # Of 14 seconds 5 are the prepared stage's: the others are ended before, and the last of them isn't begun.
    status, out = trivial.run("b1,p1,b2", "--jobs=2", "--budget=20", "--elapsed=6", BESIDE_SECONDS="60")
    assert status == 1, out
    assert trivial.result("b1")["status"] == "timeout"
    assert trivial.result("p1")["status"] == "passed"
    assert "b2: left, it needs 5 s of " in out
    assert "left: b2" in out


def test_a_prepared_stage_without_time_is_left(trivial: Trivial) -> None:
    status, out = trivial.run("p1,p2", "--jobs=2", "--budget=12", ALONE_SECONDS="60")
    assert (status, trivial.result("p1")["status"]) == (1, "timeout")
    assert "p2: left, " in out
    assert "are left for measuring" in out
    assert "| p2 | left |" in (trivial.output / "summary.md").read_text()
