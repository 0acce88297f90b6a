"""However the command ends, its engine ends with it: real engines, asked, loading, and killed under them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.evaluation.conftest import ENGINE_FLAGS

ROOT = Path(__file__).parents[2]
SECONDS = 120.0


def until(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + SECONDS
    while not holds():
        assert time.monotonic() < deadline, what
        time.sleep(0.1)


def engine_of(command: int) -> int | None:
    """The process that holds the command's engine, which leads a group of its own."""
    for child in Path(f"/proc/{command}/task/{command}/children").read_text().split():
        if os.getpgid(int(child)) == int(child):
            return int(child)
    return None


def living(group: int) -> list[str]:
    """Processes of a group that live."""
    listed = subprocess.run(["ps", "-eo", "pgid=,pid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in listed.splitlines()]
    return [pid for its_group, pid, state in rows if int(its_group) == group and state[0] not in "ZX"]


@pytest.fixture
def running(circuit: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """An evaluation with more prompts than it will be let answer."""
    arguments = ["eval", "ruler", str(circuit), "--lengths", "1500", "--samples", "400", "--tasks", "vt"]
    process = subprocess.Popen(
        [sys.executable, "-m", "vllm_trimix.cli.main", *arguments, "--output", str(tmp_path / "out"), *ENGINE_FLAGS],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    yield process
    process.kill()
    process.wait()
    assert process.stdout is not None
    process.stdout.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_an_engine_that_answers_ends_with_its_command(
    number: signal.Signals, running: subprocess.Popen[str], tmp_path: Path
) -> None:
    answers = tmp_path / "out" / "answers.jsonl"
    until(lambda: answers.exists() or running.poll() is not None, "no answer")
    assert running.poll() is None, running.communicate()[0]
    engine = engine_of(running.pid)
    assert engine is not None
    # Itself and the engine core.
    assert len(living(engine)) >= 2
    running.send_signal(number)
    until(lambda: running.poll() is not None, "the command goes on")
    until(lambda: living(engine) == [], "an orphan")
    if number == signal.SIGTERM:
        assert running.returncode == 128 + number
        assert "the same command goes on where it was" in running.communicate()[0]
    assert "vt/1500/0" in {json.loads(line).get("sample") for line in answers.read_text().split("\n")[1:-1]}


def test_an_engine_that_loads_ends_with_its_command(running: subprocess.Popen[str]) -> None:
    until(lambda: running.poll() is not None or engine_of(running.pid) is not None, "no engine")
    engine = engine_of(running.pid)
    assert engine is not None
    time.sleep(1)
    running.kill()
    until(lambda: living(engine) == [], "an orphan")
