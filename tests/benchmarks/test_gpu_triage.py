"""What the GPU run says of failures: defects put into launches, processes that die, a sanitizer that refuses."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks.gpu.crew import Crew, Ended, Task
from benchmarks.gpu.variants import interpreter_is_sound
from tests.benchmarks.misbehaving import die, misbehave, nothing, spoilt
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


def ended(crew: Crew, *defects: str, **limits: Any) -> dict[str, Ended]:
    """Small tasks, each with its defect, by how they ended."""
    return {each.task.name: each for each in crew.run([Task(d, misbehave, (d,)) for d in defects], **limits)}


def test_a_process_that_dies_takes_no_other_task_with_it() -> None:
    with Crew(2, prepare=nothing, sound=nothing) as crew:
        found = ended(crew, "a", "abort", "b", "exit", "c", "hang", "d", limit=2.0)
    assert {name: found[name].how for name in found} == {
        "a": "returned", "b": "returned", "c": "returned", "d": "returned",
        "abort": "died", "exit": "died", "hang": "hung",
    }  # fmt: skip
    assert found["abort"].error == f"its process died, {signal.SIGABRT.name}"
    assert found["exit"].error == "its process died, exit status 77"
    assert found["hang"].error.startswith("stopped after 2 s")


@pytest.mark.parametrize("sound", [nothing, spoilt])
def test_a_spoiled_process_gets_no_further_task(sound: Any) -> None:
    with Crew(1, prepare=nothing, sound=sound) as crew:
        found = ended(crew, "a", "raise", "b", limit=20.0)
    assert found["raise"].how == "raised"
    assert found["raise"].error.startswith("RuntimeError: CUDA error: an illegal memory access")
    assert (found["a"].value == found["b"].value) is (sound is nothing)


def test_what_does_not_fit_in_the_box_is_left_or_cut() -> None:
    with Crew(1, prepare=nothing, sound=nothing) as crew:
        crew.wait()
        until = time.monotonic() + 0.8
        found = ended(crew, "a", "hang", "b", limit=50.0, start_until=until, end_by=until + 0.2)
        assert time.monotonic() - until < 2
        assert [found[name].how for name in ("a", "b", "hang")] == ["returned", "left", "cut"]
        # The crew goes on.
        assert ended(crew, "c", limit=20.0)["c"].how == "returned"


def test_processes_that_never_start_are_no_endless_loop() -> None:
    with (
        pytest.raises(RuntimeError, match="processes died while they started, exit status 3"),
        Crew(1, prepare=die, sound=nothing) as crew,
    ):
        crew.wait()
