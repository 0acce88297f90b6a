"""Where a prefill's time goes: the table and plot, what is refused, and one real run of both engines."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import benchmark_breakdown as breakdown
from benchmarks.breakdown import engine as breakdown_engine
from benchmarks.breakdown import report as breakdown_report
from benchmarks.breakdown.timeline import CATEGORIES
from vllm_trimix.demo.bench_model import SHAPES, make_bench_model


def row(config: str, **seconds: float) -> dict[str, Any]:
    total = {category: seconds.get(category.replace(" ", "_"), 0.0) for category in CATEGORIES}
    wall = sum(total.values())
    sample = {
        "device": "cpu",
        "steps": 2,
        "profiled_s": wall,
        "profiled_cpu_s": wall,
        "window_s": wall,
        "seconds": total,
        "ranges": {},
        "other": {},
    }
    return {"config": config, **breakdown_engine._row(8192, [(wall, wall)], [sample])}


def test_table_and_plot(tmp_path: Path) -> None:
    rows = [
        row("stock", linear=1.0, dense_attention=3.0),
        row("trimix", linear=1.0, dense_attention=1.5, triangle_body=0.25, tail=0.05, plan=0.0004, scheduler=0.0007),
    ]
    text = breakdown_report.table(rows)
    assert "| linear | 1.0000 (25.0%) | 1.0000 (35.7%) |" in text
    assert "| plan | 0 (0%) | 0.0004 (<0.1%) |" in text
    assert "| engine steps | 2 | 2 |" in text
    breakdown_report.plot(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_row_is_one_sample_so_that_it_sums() -> None:
    samples = [
        {
            "device": "cpu",
            "steps": 1,
            "profiled_s": total,
            "profiled_cpu_s": total,
            "window_s": total,
            "seconds": {**dict.fromkeys(CATEGORIES, 0.0), "linear": total / 2, "other": total / 2},
            "ranges": {},
            "other": {},
        }
        for total in (3.0, 1.0, 1.1)
    ]
    found = breakdown_engine._row(4096, [(1.0, 0.5), (1.2, 1.1), (0.9, 1.3)], samples)
    assert found["profiled_s"] == sum(found["seconds"].values()) == 1.1
    assert found["wall_s"] == 1.0
    assert found["overhead"] == pytest.approx(0.1)
    assert found["cpu_overhead"] == pytest.approx(0)
    assert found["status"] == "ok"


@pytest.mark.parametrize(
    ("plain", "said"),
    [
        ((1.0, 1.5), "refused: +50% time under the profiler, limit 15% (+0% CPU time: the machine was busy)"),
        ((2.0, 1.5), "refused: -25% time under the profiler, limit 15% (+0% CPU time: the machine was busy)"),
        ((1.0, 1.0), "refused: +50% time under the profiler, limit 15% (+50% CPU time: the profiler costs too much)"),
    ],
)
def test_a_row_too_far_from_the_unprofiled_request_is_refused(
    plain: tuple[float, float], said: str, tmp_path: Path
) -> None:
    fine = row("stock", linear=1.0)
    sample = {**fine["samples"][0], "profiled_s": 1.5, "profiled_cpu_s": 1.5, "window_s": 1.5}
    bad = {"config": "trimix", **breakdown_engine._row(8192, [plain], [sample])}
    assert bad["status"] == said
    text = breakdown_report.table([fine, bad])
    assert "| linear | 1.0000 (100.0%) | refused |" in text
    assert said in text
    breakdown_report.plot([fine, bad], tmp_path / "plot.png")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--lengths=999999999"], "--lengths: 999999999 prompt tokens and 1 for the answer exceed the model's"),
        (["--lengths=0"], "--lengths: 0 is not a prompt length"),
        (["--lengths=4k"], "--lengths: '4k' in '4k' is not a number of tokens"),
        (["--model=nowhere"], "--model: 'nowhere' holds no config.json"),
        (["--trimix={"], "--trimix: '{' is not JSON"),
        (["--trimix=[4]"], 'trimix: expected a JSON object such as {"starting_layer": 16}, got list'),
        (['--trimix={"n_last": 4}'], "unknown key 'n_last' in trimix config; did you mean"),
        (['--trimix={"starting_layer": 8}'], "trimix.starting_layer: 8 is outside this model's 8 layers (0-7)"),
        (["--config=wide"], "--config: 'wide' is not NAME=JSON"),
        (["--config=stock={}"], "--config: the name 'stock' is taken"),
        (['--config=a/b={"layers": ""}'], """--config: 'a/b={"layers": ""}' is not NAME=JSON"""),
        (["--repeats=0"], "--repeats: 0 measures nothing"),
        (["--cpus=all"], "--cpus: 'all' is not a list of cores"),
    ],
)
def test_bad_input_starts_nothing(
    arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(subprocess, "Popen", None)
    assert breakdown.main([f"--output={tmp_path / 'out'}", *arguments]) == 2
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert said in errors
    assert errors.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bench") / "bench-8l"
    make_bench_model(directory, SHAPES["bench-8l"])
    return directory


def test_real_engines(model: Path, tmp_path: Path) -> None:
    breakdown.run_breakdown(
        model,
        [1500],
        {"stock": None, "trimix": {"starting_layer": 4, "min_prompt_len": 0}},
        tmp_path,
        repeats=1,
        engine_args=(*breakdown.DEFAULT_ENGINE_ARGS, "--enforce-eager", "--max-num-batched-tokens=1024"),
    )
    stock, trimix = json.loads((tmp_path / "breakdown.json").read_text())["rows"]
    for found in (stock, trimix):
        assert found["device"] == "cpu"
        assert found["steps"] == 2
        assert sum(found["seconds"].values()) == pytest.approx(found["profiled_s"], rel=0.01)
        assert sum(found["share"].values()) == pytest.approx(1)
        assert min(found["seconds"][name] for name in ("linear", "dense attention", "scheduler", "other")) > 0
        # Each step is scheduled once and reported once.
        assert found["ranges"]["scheduler"] == 4
    assert [stock["seconds"][name] for name in ("triangle body", "tail", "plan")] == [0, 0, 0]
    assert stock["ranges"]["dense attention"] == 8 * 2
    assert min(trimix["seconds"][name] for name in ("triangle body", "tail", "plan")) > 0
    # Rows 0-1023, all body; then 1024-1499, of which the last 128 are the tail.
    assert trimix["ranges"]["dense attention"] == 4 * 2
    assert trimix["ranges"]["triangle body"] == 4 * 2
    assert trimix["ranges"]["tail"] == 4
    # Per step: tracking, plan, count, the layers' own part.
    assert trimix["ranges"]["plan"] == 4 * 2
    assert {path.name for path in tmp_path.iterdir()} == {"breakdown.json", "breakdown.md", "breakdown.png"}
    assert "stock = stock vLLM" in (tmp_path / "breakdown.md").read_text()


def test_a_dead_engine_shows_the_end_of_its_log_and_keeps_its_rows(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = tmp_path / "engine"
    finished = json.dumps(row("stock", linear=1.0))
    engine.write_text(f"#!/bin/sh\nread job\necho '{finished}'\nseq 1000 >&2\necho out of luck >&2\nexit 7\n")
    engine.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(engine))
    out = tmp_path / "out"
    with pytest.raises(
        breakdown.BreakdownError, match=r"(?s)'stock': its engine ended with status 7.*out of luck$"
    ) as e:
        breakdown.run_breakdown(model, [100, 200], {"stock": None, "trimix": {"starting_layer": 4}}, out)
    assert str(e.value).count("\n") == 25
    assert (out / "stock.log").read_text().startswith("1\n2\n")
    assert len(json.loads((out / "breakdown.json").read_text())["rows"]) == 1
    assert "1.0000 (100.0%)" in (out / "breakdown.md").read_text()


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_benchmark(sign: signal.Signals, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.benchmark_breakdown", f"--output={tmp_path}", "--lengths=64"],
        cwd=breakdown.ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    children: list[int] = []
    deadline = time.monotonic() + 60
    while not children and time.monotonic() < deadline:
        time.sleep(0.2)
        listed = subprocess.run(
            ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True, check=False
        )
        children = [int(pid) for pid in listed.stdout.split() if _is_child(int(pid))]
    assert children, "no engine process was started"
    process.send_signal(sign)
    errors = process.communicate(timeout=30)[1]
    deadline = time.monotonic() + 30
    while _is_child(children[0]) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _is_child(children[0])
    if sign == signal.SIGINT:
        assert process.returncode == 130
        assert "interrupted; finished rows are in" in errors


def _is_child(pid: int) -> bool:
    try:
        return b"benchmarks.breakdown.engine" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return False
