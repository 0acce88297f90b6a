"""However the command ends, its engine ends with it: real engines that answer, and one that hangs."""

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
from vllm_trimix.measurement import stopping

ROOT = Path(__file__).parents[2]
# An engine takes minutes to start on a busy machine.
SECONDS = 300.0


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


COMMAND = """
import sys
from vllm_trimix.cli import main
from vllm_trimix.measurement.engine_process import EngineProcess

def run(args):
    with EngineProcess("tests.evaluation.hanging_engine", {}) as engine:
        engine.wait_ready()
        print("asked", flush=True)
        engine.ask({"come": "back"})

class Parser:
    def parse_known_args(self, *_):
        return None, []

main.build_parser = lambda _: (Parser(), type("Module", (), {"run": staticmethod(run)}))
sys.exit(main.main([]))
"""


@pytest.mark.parametrize(
    ("number", "status"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)],
    ids=lambda value: getattr(value, "name", ""),
)
def test_an_engine_that_hangs_ends_with_its_command(number: signal.Signals, status: int) -> None:
    """Nobody reads what it would be told, and it has a child that doesn't mind a SIGTERM."""
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    engine = None
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "asked\n"
        engine = engine_of(process.pid)
        assert engine is not None
        until(lambda: len(living(engine)) == 2, "no child")
        process.send_signal(number)
        _, error = process.communicate(timeout=SECONDS)
        assert process.returncode == status, error
        until(lambda: living(engine) == [], "an orphan")
    finally:
        process.kill()
        if engine is not None and living(engine):
            os.killpg(engine, signal.SIGKILL)


def test_signals_that_are_ignored_stay_so() -> None:
    """As under nohup; and afterwards everything is as it was."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        changed = stopping.raise_on_signals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        with pytest.raises(stopping.Stopped) as stopped:
            signal.raise_signal(signal.SIGTERM)
        assert (stopped.value.number, str(stopped.value)) == (15, "SIGTERM")
        with stopping.held_off():
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        stopping.restore(changed)
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)
