"""The check against recorded ratios: its verdicts, what it refuses, and one real run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import benchmark_check
from benchmarks.benchmark_check import RECORDED, ROUNDS, compare, cpu_kind, main, read_recorded
from benchmarks.environment import environment

ROOT = Path(__file__).parents[2]
KIND = "a CPU, 2 cores, float32"


def make_run(kind: str = KIND, **ratios: list[float]) -> dict[str, Any]:
    """A run of five rounds or so, whose interval is the whole range."""
    return {"environment": {"date": "2026-11-29", "commit": "abc"}, "cpu_kind": kind, "ratios": ratios}


BEFORE = [make_run(triangle=[0.50, 0.52, 0.51, 0.53, 0.55]), make_run(triangle=[0.48, 0.50, 0.51, 0.52, 0.60])]


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        # 0.6 is the highest end recorded, 0.612 is 2% above.
        (0.613, 0.9, "WORSE than before"),
        (0.611, 0.9, "as before"),
        (0.2, 0.9, "as before"),
        (0.2, 0.481, "as before"),
        (0.2, 0.479, "better than before"),
    ],
)
def test_a_ratio_beside_the_recorded_ones(low: float, high: float, verdict: str) -> None:
    lines, worse = compare(make_run(triangle=[low, low, high, high, high]), BEFORE)
    assert lines[0] == f"{KIND}; 2026-11-29; commit abc"
    assert lines[1] == (
        f"triangle: {high:.3f} of stock ({low:.3f}-{high:.3f}, 94%, 5 rounds); {verdict}: "
        "0.480-0.600 in 2 recorded runs"
    )
    assert lines[2] == "worse: an interval that begins more than 2% above the highest end recorded"
    assert worse == (["triangle"] if verdict.startswith("WORSE") else [])


def test_two_processes_of_the_same_code_are_the_same() -> None:
    """A run is never worse than itself, nor than one that gave 2% less."""
    run = make_run(triangle=[0.50, 0.52, 0.51, 0.53, 0.55], plan=[8.5, 8.5, 8.5, 8.5, 8.5])
    assert compare(run, [run])[1] == []
    faster = make_run(**{name: [ratio / 1.019 for ratio in ratios] for name, ratios in run["ratios"].items()})
    assert compare(run, [faster])[1] == []
    faster = make_run(**{name: [ratio / 1.021 for ratio in ratios] for name, ratios in run["ratios"].items()})
    assert compare(run, [faster])[1] == ["plan"], "the other's interval is wider"


@pytest.mark.parametrize(
    ("recorded", "said"),
    [
        ([], "no run of this kind of CPU is recorded, so nothing is judged"),
        (
            [make_run("z", triangle=[0.1] * 5), make_run("y", triangle=[0.1] * 5), make_run("z", triangle=[0.1] * 5)],
            "no run of this kind of CPU is recorded, so nothing is judged; the recorded runs are of y and of z",
        ),
    ],
    ids=["none", "other-kinds"],
)
def test_nothing_to_compare_with(recorded: list[dict[str, Any]], said: str) -> None:
    lines, worse = compare(make_run(triangle=[0.7] * 5), recorded)
    assert worse == []
    assert lines[1:] == [said, "triangle: 0.700 of stock (0.700-0.700, 94%, 5 rounds)"]


def test_a_ratio_that_was_not_recorded_is_not_judged() -> None:
    lines, worse = compare(make_run(new=[9.0] * 5, triangle=[9.0] * 5), BEFORE[:1])
    assert worse == ["triangle"]
    assert lines[1] == "new: 9.000 of stock (9.000-9.000, 94%, 5 rounds)"
    assert lines[2].endswith("WORSE than before: 0.500-0.550 in 1 recorded run")


def test_kinds_of_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark_check, "multiplies_bf16", lambda: True)
    where = {"cpu": "a CPU", "cores": 2, "amx": True, "avx512_bf16": False}
    assert cpu_kind(where) == "a CPU, 2 cores, amx, bfloat16"
    monkeypatch.setattr(benchmark_check, "multiplies_bf16", lambda: False)
    assert cpu_kind({**where, "amx": False}) == KIND


def test_the_recorded_runs_can_be_read() -> None:
    runs = read_recorded(RECORDED)
    assert runs
    for run in runs:
        assert len(run["ratios"]) == 4
        assert all(len(ratios) >= ROUNDS for ratios in run["ratios"].values())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "4"], "--rounds: 4 are too few for an interval; the least is 5"),
        (["--scale", "0"], "--scale: 0 is not above 0 and up to 1"),
        (["--scale", "1.5"], "--scale: 1.5 is not above 0 and up to 1"),
        (["--record", "--scale", "0.5"], "--scale: 0.5 is for a trial; leave it out to record a run"),
        (["--record", "--recorded", "gone/runs.json"], "--recorded: gone is no folder; make it, or name another file"),
    ],
)
def test_bad_input_measures_nothing(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_check, "measure", None)
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"benchmark_check: error: {said}\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "5",
        "{}}",
        '{"cpu_kind": "x"}',
        "[1]",
        '[{"ratios": {}}]',
        '[{"cpu_kind": "x"}]',
        '[{"cpu_kind": 1, "ratios": {}}]',
        '[{"cpu_kind": "x", "ratios": [1]}]',
        '[{"cpu_kind": "x", "ratios": {"a": []}}]',
        '[{"cpu_kind": "x", "ratios": {"a": ["b"]}}]',
        None,
    ],
    ids=lambda text: text if text else "nothing" if text == "" else "a folder",
)
def test_a_file_of_something_else_is_refused_before_anything_is_measured(
    tmp_path: Path, text: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(benchmark_check, "measure", None)
    file = tmp_path / "runs.json"
    file.mkdir() if text is None else file.write_text(text)
    assert main(["--recorded", str(file)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"benchmark_check: error: --recorded: {file} holds no runs of this benchmark (")
    assert said.endswith("); name another file\n")
    assert said.count("\n") == 1


def test_runs_are_kept_and_held_against(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "runs.json"
    asked = []

    def give(*ratios: float) -> int:
        def measure(**options: Any) -> dict[str, list[float]]:
            asked.append(options)
            return {"triangle": list(ratios)}

        monkeypatch.setattr(benchmark_check, "measure", measure)
        return main(["--recorded", str(file), *(["--record"] if ratios[0] < 0.6 else [])])

    assert give(0.5, 0.52, 0.51, 0.53, 0.55) == 0
    assert f"recorded in {file}" in capsys.readouterr().out
    assert give(0.58, 0.58, 0.58, 0.58, 0.58) == 1
    assert "WORSE than before" in capsys.readouterr().out
    # Recorded all the same, the later run is now what others are held against.
    assert [run["ratios"]["triangle"][0] for run in json.loads(file.read_text())] == [0.5, 0.58]
    assert give(0.59, 0.59, 0.59, 0.59, 0.59) == 0
    before = file.read_text()
    assert give(0.7, 0.7, 0.7, 0.7, 0.7) == 1
    assert file.read_text() == before
    assert asked == [{"rounds": ROUNDS, "scale": 1.0}] * 4


@pytest.mark.slow
def test_a_real_run(tmp_path: Path) -> None:
    """On this machine, held against figures that no machine gives."""
    file = tmp_path / "runs.json"
    kind = cpu_kind(environment())
    lengths = {"first token after 819 tokens, triangle": 1e-3, "first token after 1638 tokens, triangle": 1e3}
    file.write_text(json.dumps([make_run(kind, **{name: [ratio] * 5 for name, ratio in lengths.items()})]))
    command = [sys.executable, "-m", "benchmarks.benchmark_check", "--rounds=5", "--scale=0.1", f"--recorded={file}"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert found.returncode == 1, found.stderr
    lines = dict(line.split(": ", 1) for line in found.stdout.splitlines() if " of stock (" in line)
    assert list(lines) == [
        *lengths,
        "first token after 1638 tokens, triangle + vertical_slash",
        "planning a step of 512 decodes",
    ]
    worse, better = (lines[name] for name in lengths)
    assert "WORSE than before: 0.001-0.001 in 1 recorded run" in worse
    assert "better than before: 1000.000-1000.000 in 1 recorded run" in better
    for line in lines.values():
        ratio = float(line.split()[0])
        assert 0.05 < ratio < 100
        assert "5 rounds" in line
