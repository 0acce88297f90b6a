"""A prepared run fits its minutes: boxes, budgets, and the seconds that a rehearsal spends outside kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu.programs import PROGRAMS
from benchmarks.gpu.stage import Stage
from benchmarks.gpu.timeline import UNPACK_SECONDS, outside_kernels, projected_seconds

ROOT = Path(__file__).parents[2]
# Of a machine with an H200 and 16 cores.
JOBS = 8


def test_the_layout_of_a_run() -> None:
    stages = [
        Stage("a", "m:f", 1, "", use="beside", device=2),
        Stage("p", "m:f", 1, "", use="prepared", device=7),
        Stage("b", "m:f", 1, "", use="beside", device=0),
        Stage("c", "m:f", 1, "", use="beside", device=1),
    ]
    outside = {"a": 10.0, "p": 30.0, "b": 5.0, "c": 4.0}
    # Two slots: a (12) then b (17) and c (22); p prepares for 30, and is alone for 7.
    assert projected_seconds(stages, outside, 2) == UNPACK_SECONDS + 30 + 7
    assert projected_seconds(stages, outside, 1) == UNPACK_SECONDS + 12 + 30 + 5 + 5 + 7
    assert projected_seconds(stages, {"b": 5.0}, 2) == UNPACK_SECONDS + 5
    assert outside_kernels({"seconds": 20.0, "device_seconds": 6.5}) == 13.5
    assert outside_kernels({"seconds": 20.0}) == 20


@pytest.mark.parametrize("name", ["first", "second"])
def test_what_stages_expect_fits_the_budget(name: str) -> None:
    program = PROGRAMS[name]
    assert program.budget is not None
    for stage in program.stages:
        assert stage.use in ("beside", "prepared"), "a stage that is alone from its start makes all others wait"
        assert stage.limit is not None
        assert stage.seconds <= stage.limit <= program.budget
        assert stage.use == "beside" or stage.prepare > 0
    assert any(stage.use == "prepared" for stage in program.stages)
    # Each stage as long as it expects to be, side by side, and then what is timed.
    expected = {
        stage.name: stage.prepare / 2 if stage.use == "prepared" else stage.seconds - stage.device
        for stage in program.stages
    }
    assert projected_seconds(program.stages, expected, JOBS) <= program.budget
    # What is timed has its whole time even if everything else hangs.
    timed = sum(stage.seconds for stage in program.stages if stage.use == "prepared")
    assert timed <= program.budget - UNPACK_SECONDS - min(stage.seconds for stage in program.stages)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["first", "second"])
def test_a_rehearsal_fits_the_budget(tmp_path: Path, name: str) -> None:
    pytest.importorskip("vllm", reason="stages run vLLM")
    program = PROGRAMS[name]
    assert program.budget is not None
    found = subprocess.run(
        ["bash", str(ROOT / "benchmarks" / "gpu" / program.script), "--toy", f"--output={tmp_path / 'out'}"],
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
    )
    assert found.returncode == 0, found.stdout + found.stderr
    results = {
        stage.name: json.loads((tmp_path / "out" / f"{stage.name}.json").read_text()) for stage in program.stages
    }
    outside = {name: outside_kernels(result) for name, result in results.items()}
    for stage in program.stages:
        limit = stage.prepare if stage.use == "prepared" else stage.limit
        assert limit is not None
        assert outside[stage.name] <= limit, f"{stage.name}: {outside[stage.name]:.0f} s outside kernels"
    total = projected_seconds(program.stages, outside, JOBS)
    print(f"{name}.sh: {total:.0f} s of {program.budget:.0f} s on an H200, by {outside}")
    assert total <= program.budget
