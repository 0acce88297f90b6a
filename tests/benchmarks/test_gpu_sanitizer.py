"""What the GPU run makes of compute-sanitizer's words, refusals and silence."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import sanitizer
from tests.benchmarks.failing import fake_sanitizer

CLEAN = """========= COMPUTE-SANITIZER
case {case} is right
========= ERROR SUMMARY: 0 errors
"""
INVALID = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 16 bytes
=========     at triangle_prefill_kernel+0x1a30
=========     by thread (96,0,0) in block (3,0,0)
=========     Access at 0x7f4c1e001000 is out of bounds
========= Program hit CUDA_ERROR_LAUNCH_FAILED (error 719) due to "unspecified launch failure" on CUDA API call.
========= ERROR SUMMARY: 33 errors
"""
HAZARD = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at estimate_kernel+0x9d0
=========     and Read access at estimate_kernel+0xa10 [128 hazards]
case {case} is right
========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)
"""
REFUSED = """========= COMPUTE-SANITIZER
========= Error: Device not supported. Please refer to the "Supported Devices" section of the sanitizer documentation
========= ERROR SUMMARY: 0 errors
"""
# Of the real tool on a program that uses no GPU, and of a version that runs nothing and calls it clean.
UNSEEN = """========= COMPUTE-SANITIZER
========= Error: Target application terminated before first instrumented API call
"""
FALSE_PASS = """========= COMPUTE-SANITIZER
========= ERROR SUMMARY: 0 errors
"""


@pytest.mark.parametrize(
    ("prints", "tool", "outcome", "sentence"),
    [
        (CLEAN, "memcheck", "clean", "memcheck of gqa4: no error, and the answer is right"),
        (CLEAN.replace("right", "wrong: error 3"), "memcheck", "clean", "no error, though the answer is wrong"),
        (INVALID, "memcheck", "errors", "33 errors, the first: Invalid __global__ read of size 16 bytes"),
        (HAZARD, "racecheck", "errors", "1 errors, the first: Error: Race reported between Write access"),
        (
            CLEAN.replace("ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed"),
            "racecheck",
            "clean",
            "no",
        ),
        (REFUSED, "memcheck", "refused", "it refuses this device: Error: Device not supported."),
        (UNSEEN, "memcheck", "proved nothing", "Target application terminated before first instrumented API call"),
        (FALSE_PASS, "memcheck", "proved nothing", "the case did not run to its end under it"),
        ("", "memcheck", "proved nothing", "it printed nothing"),
    ],
)
def test_what_the_sanitizer_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prints: str, tool: sanitizer.Tool, outcome: str, sentence: str
) -> None:
    fake_sanitizer(tmp_path, monkeypatch, f"cat <<'END'\n{prints.format(case='gqa4')}END")
    finding = sanitizer.Run("gqa4", tool, 20.0).finish()
    assert finding.outcome == outcome, finding
    assert sentence in finding.sentence
    asked = (tmp_path / "asked").read_text().split("\n")
    assert asked[:2] == ["--tool", tool]
    assert asked[-7:-1] == [sys.executable, "-m", "benchmarks.gpu.one_case", "gqa4", "--device", "cuda"]


def test_a_sanitizer_that_hangs_is_killed_with_what_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_sanitizer(tmp_path, monkeypatch, f"sleep 60 & echo $! >{tmp_path}/child; echo begun; wait")
    started = time.monotonic()
    finding = sanitizer.Run("gqa4", "memcheck", 1.0).finish()
    assert time.monotonic() - started < 10
    assert (finding.outcome, finding.lines) == ("time ran out", ["begun"])
    assert finding.sentence == "memcheck of gqa4: it had not ended after 1 s"
    child = Path("/proc") / (tmp_path / "child").read_text().strip() / "stat"
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_where_the_sanitizer_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(sanitizer, "_TOOLKIT", tmp_path / "toolkit")
    assert sanitizer.find([str(tmp_path)]) is None
    assert sanitizer.Run("gqa4", "memcheck", 1.0).finish().outcome == "missing"
    for part in ("nvidia/cuda_sanitizer_api/bin", "nvidia/cu13/bin", "nvidia/cu13/compute-sanitizer"):
        program = tmp_path / part / "compute-sanitizer"
        program.parent.mkdir(parents=True)
        program.touch()
        assert sanitizer.find([str(tmp_path / "none"), str(tmp_path)]) != str(program), "it is no program"
        program.chmod(0o755)
        assert sanitizer.find([str(tmp_path / "none"), str(tmp_path)]) == str(program)
