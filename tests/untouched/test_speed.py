"""With another backend selected, an engine is as fast with the plugin as without it."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.engine.models import save_tiny_llama
from tests.tiers import Tier
from vllm_trimix.intervals import interval_confidence, median_interval

ROOT = Path(__file__).parents[2]
ROUNDS = 8
"""Pairs of processes: what two processes of one and the same program differ by is chance between rounds."""
TURNS = 15
"""Of each process in a round, after those that warm up."""
WARM_UP = 3

# Steps as small as an engine's ever are, and many of them: what the plugin could add, it would add to each.
JOB = {
    "max_tokens": 24,
    "prompts": [[7 + (13 * index + number) % 240 for index in range(260)] for number in range(4)],
}


class Engine:
    """A process that times one job when it is asked."""

    def __init__(self, process: subprocess.Popen[str], replies: Any) -> None:
        self._process, self._replies = process, replies
        self.ours: list[str] = []

    def wait_ready(self) -> None:
        self.ours = json.loads(self._line())

    def seconds(self) -> tuple[float, float]:
        """Of one job: on the wall's clock, and of processor time."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        wall, used = json.loads(self._line())
        return wall, used

    def _line(self) -> str:
        line = self._replies.readline()
        assert line, f"the engine ended, status {self._process.wait(30)}"
        return str(line)


@contextlib.contextmanager
def engine(model: Path, log: Path, *, plugins: str) -> Iterator[Engine]:
    settings = {
        "model": str(model),
        "attention_backend": "CPU_ATTN",
        "max_model_len": 512,
        "max_num_batched_tokens": 64,
        "dtype": "float32",
    }
    ours, theirs = os.pipe()
    env = {**os.environ, "VLLM_PLUGINS": plugins, "OMP_NUM_THREADS": "1"}
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.untouched.timed", str(theirs)],
            stdin=subprocess.PIPE,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs,),
            env=env,
            cwd=ROOT,
            text=True,
        )
    os.close(theirs)
    assert process.stdin is not None
    with os.fdopen(ours) as replies:
        try:
            process.stdin.write(json.dumps({"engine": settings, **JOB}) + "\n")
            process.stdin.flush()
            found = Engine(process, replies)
            found.wait_ready()
            yield found
        finally:
            # The end of its input ends it.
            with contextlib.suppress(BrokenPipeError):
                process.stdin.close()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.tier("J")
def test_an_engine_is_as_fast(tmp_path: Path, tier: Tier, record_property: Any) -> None:
    """The interval of the paired ratio holds 1. It is sound on a busy machine, only wider there.

    A round starts both engines anew and lets them take turns, the first one alternating, so that what else the machine
    does meets both alike; its ratio is the median over the turns. Rounds are independent: the interval is over them.
    """
    model = save_tiny_llama(tmp_path / "model", num_heads=4, num_kv_heads=2)
    rounds: list[tuple[float, float]] = []
    for number in range(ROUNDS):
        order = ("", "trimix") if number % 2 == 0 else ("trimix", "")
        with contextlib.ExitStack() as stack:
            engines = {
                plugins: stack.enter_context(engine(model, tmp_path / f"{number}-{plugins}.log", plugins=plugins))
                for plugins in order
            }
            assert engines[""].ours == []
            assert "vllm_trimix.backend.registration" in engines["trimix"].ours
            for _ in range(WARM_UP):
                for plugins in order:
                    engines[plugins].seconds()
            ratios = []
            for turn in range(TURNS):
                took = {plugins: engines[plugins].seconds() for plugins in (order if turn % 2 else order[::-1])}
                ratios.append([took["trimix"][kind] / took[""][kind] for kind in (0, 1)])
        rounds.append((statistics.median(r[0] for r in ratios), statistics.median(r[1] for r in ratios)))
        tier.case("round", number)
    for name, values in zip(("wall", "processor"), zip(*rounds, strict=True), strict=True):
        low, high = median_interval(values)
        said = f"{name}: {statistics.median(values):.4f} ({low:.4f}-{high:.4f}, {interval_confidence(ROUNDS):.1%})"
        record_property(name, said)
        print(said)
        assert low <= 1 <= high, f"{said} does not hold 1; rounds: {[round(value, 4) for value in values]}"
        assert high - low < 0.2, f"{said} is too wide to mean anything: give it a machine to itself"
