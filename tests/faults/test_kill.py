"""A process of the server is killed in mid-prefill: what follows is what follows with vLLM's own backend."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.faults import counts
from tests.server.server import Server, serve
from tests.tiers import Tier
from vllm_trimix.cli.main import main
from vllm_trimix.demo.prompts import make_demo_prompt

PATIENCE = 240.0
"""Seconds that a server may take to end, or to answer again, before it counts as hanging."""
LOST = ("500", "503", "connection lost")
"""What a client sees of a request whose engine is gone."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("demo") / "model"
    size = ("--layers=4", "--lookup-layer=1", "--answer-layer=2", "--heads=4", "--kv-heads=1")
    assert main(["make-demo-model", str(path), *size]) == 0
    return path


def name_of(process: psutil.Process) -> str:
    """What vLLM calls a process; its number differs from start to start."""
    with contextlib.suppress(psutil.Error):
        for name in ("EngineCore", "Worker"):
            if any(name in part for part in process.cmdline()[:1]):
                return name
    return "other"


def killed(model: Path, log: Path, victim: str, backend: str) -> dict[str, Any]:
    """Kills a process while a long prompt is read; what clients and operators see of it."""
    trimix = {"stats_log_interval": 1.0, "min_prompt_len": 0} if backend == "TRIMIX" else None
    # Of two workers one is killed: the other must not stay behind.
    ranks = 2 if victim == "Worker" else 1
    arguments = ("--max-num-batched-tokens=512", f"--tensor-parallel-size={ranks}")
    found: dict[str, Any] = {}
    with (
        contextlib.suppress(ProcessLookupError),
        serve(model, log, trimix=trimix, backend=backend, arguments=arguments, start_timeout=1800) as server,
    ):
        found["processes"] = sorted({name_of(process) for process in counts.processes(server)})
        targets = [process for process in counts.processes(server) if name_of(process) == victim]
        assert len(targets) == ranks, [process.cmdline() for process in counts.processes(server)]
        statuses: list[str] = []
        document = make_demo_prompt(tokens=16_000, hops=2, seed=1).prompt
        asking = threading.Thread(target=_ask, args=(server, document, statuses))
        asking.start()
        _wait_for_work(server)
        os.kill(targets[-1].pid, signal.SIGKILL)
        asking.join(PATIENCE)
        # Stock answers 500, or is gone before it can: which of the two is a race of its own.
        found["asked meanwhile"] = ["lost" if status in LOST else status for status in statuses]
        with contextlib.suppress(Exception):
            server.process.wait(PATIENCE)
        found["ended"] = server.process.poll() is not None
        found["status"] = server.process.poll()
        found["health"] = _health(server)
        deadline = time.monotonic() + 60
        while found["ended"] and counts.processes(server) and time.monotonic() < deadline:
            time.sleep(0.5)
        found["left behind"] = sorted(name_of(process) for process in counts.processes(server))
        found["says so"] = "EngineDeadError" in server.log or "died" in server.log
    return found


def _ask(server: Server, prompt: str, statuses: list[str]) -> None:
    with httpx.Client(base_url=f"http://127.0.0.1:{server.port}", timeout=PATIENCE) as client:
        try:
            body = {"model": "demo", "prompt": prompt, "max_tokens": 64, "ignore_eos": True}
            statuses.append(str(client.post("/v1/completions", json=body).status_code))
        except httpx.TransportError:
            statuses.append("connection lost")


def _wait_for_work(server: Server) -> None:
    """Until the engine runs the request: then it is in its prefill, of more than thirty steps."""
    deadline = time.monotonic() + PATIENCE
    while not counts.metrics(server).get("vllm:num_requests_running"):
        assert time.monotonic() < deadline, "the request never ran"
        time.sleep(0.05)


def _health(server: Server) -> str:
    try:
        return str(server.client.get("/health", timeout=30).status_code)
    except httpx.TransportError:
        return "no answer"


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.tier("H")
@pytest.mark.parametrize("victim", ["EngineCore", "Worker"])
def test_a_killed_process(
    model: Path, tmp_path: Path, victim: str, tier: Tier, monkeypatch: pytest.MonkeyPatch
) -> None:
    if victim == "Worker":
        monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    stock = killed(model, tmp_path / "stock.log", victim, "CPU_ATTN")
    ours = killed(model, tmp_path / "trimix.log", victim, "TRIMIX")
    print(stock, ours)
    assert "TRIMIX: layers=" in (tmp_path / "trimix.log").read_text()
    assert "TRIMIX: layers=" not in (tmp_path / "stock.log").read_text()
    assert ours == stock
    assert stock["asked meanwhile"] == ["lost"], "it was not killed in mid-request"
    assert stock["left behind"] == []
    tier.case("kill", victim, triangle=True)
