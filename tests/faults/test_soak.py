"""Minutes of mixed traffic and abuse: nothing breaks, nothing is lost, nothing stays behind, no answer changes."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.faults import counts
from tests.faults.traffic import KINDS, MAX_MODEL_LEN, WAVE, Chaos, Kind
from tests.server.server import Server, serve
from tests.tiers import Tier
from vllm_trimix.cli.main import main
from vllm_trimix.config.entry import DEFAULT_MIN_PROMPT_LEN
from vllm_trimix.demo.prompts import make_demo_prompt

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / "build" / "soak.json"
GRACE = 900.0
"""Seconds that clients may take to start, and to finish what they have begun."""
WARM_UP = 75.0
"""Seconds of the same traffic before memory is measured: what is kept of the first giant request is no leak."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The circuit demo model at its smallest, so that long prompts are cheap."""
    path = tmp_path_factory.mktemp("demo") / "model"
    size = ("--layers=4", "--lookup-layer=1", "--answer-layer=2", "--heads=4", "--kv-heads=1")
    assert main(["make-demo-model", str(path), *size]) == 0
    return path


def golden_prompts() -> list[tuple[str, Any]]:
    """Triangle and dense, one hop and two, text and tokens that mean nothing."""
    documents = [(tokens, hops) for tokens in (900, 4500, 7000) for hops in (1, 2)]
    named = [
        (f"{tokens}-{hops}", make_demo_prompt(tokens=tokens, hops=hops, seed=5).prompt) for tokens, hops in documents
    ]
    return [*named, ("tokens", [5 + number * number % 60 for number in range(5000)])]


def drive(
    server: Server, model: Path, folder: Path, seconds: float, *, first: int = 0
) -> tuple[list[dict[str, Any]], Chaos]:
    """Clients for about this long, and one that misbehaves beside them; returns what the clients report.

    Args:
        server: Runs.
        model: Its model.
        folder: For the clients' files.
        seconds: How long.
        first: Number of the first client: no two clients of a number ask anything new.
    """
    folder.mkdir()
    chaos, stop = Chaos(server.port, first), threading.Event()
    thread = threading.Thread(target=chaos.run, args=(stop,), kwargs={"seconds": seconds + GRACE})
    numbers = (str(seconds), str(first))
    command = [sys.executable, "-m", "tests.faults.clients", str(server.port), str(model), str(folder), *numbers]
    with open(folder / "clients.log", "wb") as file:
        clients = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
    thread.start()
    try:
        status = clients.wait(seconds + GRACE)
    finally:
        stop.set()
        clients.kill()
        clients.wait()
        thread.join(GRACE)
    assert server.process.poll() is None, server.log[-5000:]
    assert status == 0, (folder / "clients.log").read_text(errors="replace")[-5000:]
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()], chaos


def is_sparse(kind: Kind, length: int) -> bool:
    """Whether a request of this kind and length has rows of the triangle."""
    return kind.trimix == "on" and length >= DEFAULT_MIN_PROMPT_LEN


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.tier("H")
def test_soak(model: Path, tmp_path: Path, tier: Tier) -> None:
    seconds = tier.size(sample=75, full=600)
    arguments = ("--enable-logging-iteration-details", "--max-num-batched-tokens=2048")
    trimix, log = {"stats_log_interval": 1.0}, tmp_path / "server.log"
    with serve(model, log, trimix=trimix, arguments=arguments, start_timeout=1800) as server:
        prompts = golden_prompts()
        before = counts.golden(server, prompts, "before")
        _, warm_up = drive(server, model, tmp_path / "warm-up", WARM_UP)
        idle = counts.wait_idle(server, 60)
        assert idle["vllm:kv_cache_usage_perc"] == 0
        start, memory = counts.rows(server), counts.memory(server)
        assert start.sparse > 0

        clients, chaos = drive(server, model, tmp_path / "soak", seconds, first=1010)

        after = counts.wait_idle(server, 120)
        end = counts.rows(server)
        grown = counts.memory(server) - memory
        left_behind = counts.growth_over_equal_requests(server)
        figures = summary(clients, chaos, start, end, memory, grown, after)
        figures["growth over 32 equal requests (MiB)"] = round(left_behind / 2**20, 1)
        # Beside `tiers.json`, for reports.
        FIGURES.parent.mkdir(exist_ok=True)
        FIGURES.write_text(json.dumps(figures, indent=1) + "\n")

        assert warm_up.unexpected + chaos.unexpected == []
        assert [status for (_, status) in (*warm_up.statuses, *chaos.statuses) if status.startswith("5")] == []
        assert [client["errors"] for client in clients if client["failed"]] == []
        assert figures["triangle requests"] >= 0.4 * figures["bench requests"]
        assert end.cached - start.cached < 0.05 * (end.scheduled - start.scheduled), "mostly cached: hardly any prefill"

        # Row by row, over everything since the start: disconnects, refusals and opt-outs among it.
        assert end.steps[0] == end.steps[1], "vLLM did not log every step: its count is not complete"
        assert end.sparse + end.dense + end.cached == end.scheduled + end.hits
        assert end.cached == end.hits
        assert end.tracked == 0

        assert after["vllm:kv_cache_usage_perc"] == 0
        assert grown < 0.1 * memory + 2**27, f"{grown / 2**20:.0f} MiB of {memory / 2**20:.0f} more than before"
        # The allocator's own ups and downs are 10 MiB; half a MiB a request would be 16.
        assert left_behind < 16 * 2**20, f"{left_behind / 2**20:.1f} MiB over 32 equal requests"
        assert counts.golden(server, prompts, "after") == before
        assert "Traceback" not in server.log
    assert server.process.returncode in (0, -2, 130), server.log[-2000:]
    for client in clients:
        for number, length in enumerate(client["input_lens"]):
            tier.case("request", client["number"], number, triangle=is_sparse(KINDS[client["kind"]], length))
    for (name, status), count in chaos.statuses.items():
        for number in range(count):
            tier.case("chaos", name, status, number)


def summary(
    clients: list[dict[str, Any]],
    chaos: Chaos,
    start: counts.Rows,
    end: counts.Rows,
    memory: int,
    grown: int,
    after: dict[str, float],
) -> dict[str, Any]:
    """The figures that a report quotes."""
    sparse = [is_sparse(KINDS[client["kind"]], length) for client in clients for length in client["input_lens"]]
    by_status: Counter[str] = Counter()
    for (_, status), count in chaos.statuses.items():
        by_status[status] += count
    return {
        "clients": len(clients),
        "bench requests": sum(client["completed"] for client in clients),
        "bench prompt tokens": sum(client["total_input_tokens"] for client in clients),
        "bench generated tokens": sum(client["total_output_tokens"] for client in clients),
        "triangle requests": sum(sparse),
        "triangle rows": end.sparse - start.sparse,
        "dense rows": end.dense - start.dense,
        "cached rows": end.cached - start.cached,
        "scheduled rows": end.scheduled - start.scheduled,
        "steps": end.steps[0] - start.steps[0],
        "triangle share of rows": round((end.sparse - start.sparse) / (end.scheduled - start.scheduled), 3),
        "chaos requests": sum(chaos.statuses.values()),
        "chaos statuses": dict(sorted(by_status.items())),
        "memory before (MiB)": round(memory / 2**20),
        "memory after (MiB)": round((memory + grown) / 2**20),
        "kv usage after": after["vllm:kv_cache_usage_perc"],
        "preemptions": int(after.get("vllm:num_preemptions_total", 0)),
    }


def test_the_mix_is_what_it_says() -> None:
    """At least 40 % of the requests of a whole turn of the wave are long and sparse."""
    mix = [KINDS[name] for name in WAVE]
    total = sum(kind.count for kind in mix)
    sparse = sum(
        is_sparse(kind, kind.lengths[number % len(kind.lengths)]) for kind in mix for number in range(kind.count)
    )
    assert sparse / total > 0.5
    assert max(max(kind.lengths) for kind in mix) < MAX_MODEL_LEN
