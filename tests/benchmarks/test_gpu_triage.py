"""What the GPU run says of failures: defects put into launches, processes that die, a sanitizer that refuses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu.crew import Crew, Task
from benchmarks.gpu.report import load
from benchmarks.gpu.variants import interpreter_is_sound
from tests.benchmarks.failing import fake_sanitizer, make_report
from tests.benchmarks.misbehaving import nothing, pass_slowly
from tests.kernels.triton_interpreter import Case, Launch, use_interpreter

pytest.importorskip("triton", reason="the kernels need Triton (Linux)")

# The second span's window starts behind pages that were never written; its last tile has 6 rows.
CASE = Case(((0, 9), (200, 22)), group=3, n_local=50, num_kv_heads=1, n_init=4, tile_rows=8)
HEAD, NOISE = 2, 0.5


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    with Crew(1, prepare=use_interpreter, sound=interpreter_is_sound) as crew:
        yield crew


def _before(launch: Launch, defect: str) -> None:
    """Defects of what a launch is given."""
    arguments = launch.arguments
    if defect == "window":
        arguments["n_local"] -= 1
    elif defect == "scale":
        arguments["v_scale"] = torch.tensor([1.25])
    elif defect == "reads freed pages":
        # Hidden by the mask, but zero times NaN is NaN.
        begin = arguments["items"][:, 4]
        begin -= torch.where(begin > 100, 64, 0)
    elif defect == "tile":
        arguments["items"] = arguments["items"][:-1]


def _after(launch: Launch, defect: str, launches: int) -> None:
    """Defects of what a launch gives."""
    out = launch.arguments["out"]
    if defect == "head":
        out[:, HEAD] += NOISE
    elif defect == "nan":
        out[launch.places()[1][1] + 5, 1, 40] = torch.nan
    elif defect == "half":
        out[:, :, 32:] *= -1
    elif defect == "race":
        out[launch.places()[0][1]] += launches


def spoiled(defect: str, function: Any, *arguments: Any) -> Any:
    """Calls a function of a worker with a defect in every launch of the triangle kernel."""
    run, launches = Launch.run, iter(range(100))

    def broken(launch: Launch) -> None:
        if not hasattr(launch, "spoiled"):
            _before(launch, defect)
            launch.spoiled = True
        run(launch)
        _after(launch, defect, next(launches))

    with mock.patch.object(Launch, "run", broken):
        return function(*arguments)


def steps(crew: Crew, defect: str, names: list[str]) -> dict[str, Any]:
    from benchmarks.gpu.case_steps import step

    tasks = [Task(name, spoiled, (defect, step, CASE, "cpu", name)) for name in names]
    ended = list(crew.run(tasks, limit=200))
    assert [each.how for each in ended] == ["returned"] * len(names), [each.error for each in ended]
    return {each.task.name: each.value for each in ended}


def line(crew: Crew, defect: str, *names: str) -> str:
    from benchmarks.gpu.case_triage import conclude

    return conclude("over budget", steps(crew, defect, ["look", *names]))


def test_nothing_is_wrong_with_a_right_launch(crew: Crew) -> None:
    found = steps(crew, "", ["look", "clean"])
    assert found["look"]["parts"] == found["look"]["faults"] == []
    assert (found["look"]["unwritten"], found["look"]["second_launch"]) == (0, "the same bits")
    assert found["clean"]["right"]


def test_a_window_that_is_off_by_one(crew: Crew) -> None:
    found = steps(crew, "window", ["look", "reference"])
    # The first span's rows see all keys in any case.
    [part] = found["look"]["parts"]
    assert part["part"] == "22 rows at 200"
    assert (part["first"]["row"], part["first"]["position"], part["first"]["kind"]) == (0, 200, "triangle")
    assert found["reference"]["right"]


def test_a_scale_that_is_applied_twice(crew: Crew) -> None:
    said = line(crew, "scale")
    assert "got is 1.25 times what is expected" in said
    assert "heads" not in said


def test_one_head(crew: Crew) -> None:
    said = line(crew, "head")
    assert f"heads {HEAD} of 3 only" in said
    assert f"first row 0 (position 0, triangle) head {HEAD} dim 0" in said
    assert "rows outside the spans were written" not in said


def test_half_of_the_dims(crew: Crew) -> None:
    said = line(crew, "half")
    assert "dims 32-63 of 64 only" in said
    assert "got is -1 times what is expected" in said


def test_one_value_that_is_no_number(crew: Crew) -> None:
    said = line(crew, "nan", "clean")
    assert "1 values" in said
    assert "first row 5 (position 205, triangle) head 1 dim 40: nan" in said
    assert "1 are NaN" in said
    assert "right when slots" not in said


def test_a_launch_that_reads_freed_pages(crew: Crew) -> None:
    said = line(crew, "reads freed pages", "clean", "reference")
    assert "are NaN" in said
    assert "right when slots that no row may read hold zeros: it reads them" in said
    assert "PyTorch on the device is right with the same inputs: the kernel is wrong" in said


def test_a_tile_that_is_never_written(crew: Crew) -> None:
    # The second span's last tile: rows 16 to 21, three heads of 64.
    said = line(crew, "tile")
    assert f"{6 * 3 * 64} values are never written" in said
    assert "rows 16-21 of 22 only" in said
    assert "whole tiles of 8 rows: 2" in said


def test_two_launches_that_differ(crew: Crew) -> None:
    said = line(crew, "race")
    assert f"two launches differ in {3 * 64} values: a race" in said


def test_inputs_that_are_wrong(crew: Crew) -> None:
    from benchmarks.gpu.case_triage import conclude

    found = crew.run([Task("reference", wrong_inputs, (CASE,))], limit=100)
    [ended] = list(found)
    assert ended.how == "returned", ended.error
    assert "the inputs are wrong" in conclude("over budget", {"reference": ended.value})


def wrong_inputs(case: Case) -> dict[str, Any]:
    from benchmarks.gpu.case_steps import step

    init = Launch.__init__

    def broken(launch: Launch, *arguments: Any) -> None:
        init(launch, *arguments)
        launch.arguments["block_table"] += 1
        launch.arguments["block_table"] %= launch.arguments["k_cache"].shape[0]

    with mock.patch.object(Launch, "__init__", broken):
        return step(case, "cpu", "reference")


REFUSED = '========= Error: Device not supported. Please refer to the "Supported Devices" section'
SMALL = {
    "fine": CASE,
    "one head": replace(CASE, n_init=3),
    "crashes": replace(CASE, n_init=2),
    "also fine": replace(CASE, n_init=1),
}


def attempted(case: Case, device: str) -> dict[str, Any]:
    """What comes of ``SMALL``; a case that is fine isn't launched."""
    from benchmarks.gpu.case_steps import attempt

    if case == SMALL["crashes"]:
        os.abort()
    if case == SMALL["one head"]:
        return spoiled("head", attempt, case, device)
    return pass_slowly(case, device)


def followed(case: Case, device: str, name: str) -> dict[str, Any]:
    """The first two steps on ``SMALL``."""
    from benchmarks.gpu.case_steps import step

    if name not in ("look", "reference"):
        return {"skipped": "seen above"}
    if case == SMALL["crashes"] and name == "look":
        os.abort()
    return spoiled("head", step, case, device, name)


def test_the_stage_follows_its_failures_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import case_triage, kernel_reference

    monkeypatch.setattr(kernel_reference, "attempt", attempted)
    monkeypatch.setattr(kernel_reference, "choose", lambda _: SMALL)
    monkeypatch.setattr(case_triage, "step", followed)
    fake_sanitizer(tmp_path, monkeypatch, f"cat <<'END'\n{REFUSED}\nEND")
    kernel_reference.kernel_reference(make_report(tmp_path, cases=None, triage=120, sanitize=20))
    result = load(tmp_path / "kernel_reference.json")
    assert result is not None
    wrong = {check["name"]: check["detail"] for check in result["checks"] if not check["passed"]}
    assert set(wrong) == {"one head", "crashes", "cases"}
    assert wrong["crashes"] == "its process died, SIGABRT"
    assert wrong["cases"].startswith("2 of 4 cases in the interpreter within the error budget; 0 did not fit, 0 were")
    lines = {each["name"]: each["line"] for each in result["triage"]}
    assert set(lines) == {"one head", "crashes"}
    assert lines["crashes"].startswith("crashes: it ends in its process died, SIGABRT; PyTorch on the device is right")
    assert "heads 2 of 3 only" in lines["one head"]
    assert "PyTorch on the device is right" in lines["one head"]
    assert [each["outcome"] for each in result["sanitizer"]] == ["refused"]
    assert "2 of 4 cases" in result["seen"]
    assert result["device_seconds"] > 0


@pytest.mark.parametrize(("box", "enough"), [(0.3, False), (60.0, True)])
def test_cases_that_the_box_leaves_are_no_failures_but_the_first_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, box: float, enough: bool
) -> None:
    from benchmarks.gpu import kernel_reference

    with Crew(1, prepare=nothing, sound=nothing) as crew:
        # Imports are not to take from the box.
        list(crew.run([Task("", pass_slowly, (None, ""))], limit=60))
        monkeypatch.setattr(kernel_reference, "_crew", lambda *_: crew)
        monkeypatch.setattr(kernel_reference, "attempt", pass_slowly)
        monkeypatch.setattr(kernel_reference, "MUST_RUN", 3)
        cases = dict(list(kernel_reference.first_cases().items())[:4])
        monkeypatch.setattr(kernel_reference, "choose", lambda _: cases)
        kernel_reference.kernel_reference(make_report(tmp_path, cases="ranked", box=box))
    result = load(tmp_path / "kernel_reference.json")
    assert result is not None
    checks = {check["name"]: check["passed"] for check in result["checks"]}
    assert checks == {"cases": True, "first cases": enough}
    assert result["cases_left"] == ([] if enough else list(cases)[1:])
    assert result["cases_passed"] == (4 if enough else 1)
    assert result["variants"] == {"abc": {"hash": "abc", "registers": 9}}
    assert result["case_results"]["served-band"]["variants"] == ["abc"]
    assert result["case_seconds"]["run"] == pytest.approx(0.1 * result["cases_passed"])


def test_the_ranking() -> None:
    from benchmarks.gpu.kernel_cases import MUST_RUN, SMALLEST, all_cases, choose, first_cases, kernel_of, ranked

    cases = list(ranked().values())
    first = cases[:MUST_RUN]
    assert cases[: len(first_cases())] == list(first_cases().values())
    assert {kernel_of(case) for case in first} == {"triangle", "sparse", "estimate"}
    assert {case.head_size for case in first} == {64, 128, 256}
    assert {case.group for case in first} == {1, 4, 7, 8}
    assert {case.q_dtype for case in first} == {"bfloat16", "float16", "float8_e4m3fn"}
    assert {case.cache_dtype for case in first} == {"", "float8_e4m3fn"}
    assert any(getattr(case, "last_rows", ()) and case.programs for case in first)
    assert {case.order for case in first} == {"BHS", "BSH"}
    assert {case.block_size for case in first if kernel_of(case) == "sparse"} == {64, 128}
    # Each once, those that fill the memory excepted.
    assert {repr(case) for case in cases} == {repr(case) for case in all_cases().values() if not case.huge}
    assert [kernel_of(all_cases()[name]) for name in SMALLEST] == ["triangle", "sparse", "estimate"]
    with pytest.raises(ValueError, match=r"cases: \['gqa5'\] unknown; expected 'ranked', None, or names"):
        choose(["gqa5", "gqa4"])
