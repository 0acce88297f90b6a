"""Worker processes of the GPU run that die, hang or are spoilt."""

from __future__ import annotations

import signal
import time
from typing import Any

import pytest

from benchmarks.gpu.crew import Crew, Ended, Task
from tests.benchmarks.misbehaving import die, misbehave, nothing, spoilt


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
