"""Minutes of mixed traffic and abuse: nothing breaks, nothing is lost, nothing stays behind, no answer changes."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.faults import counts
from tests.faults.traffic import KINDS, MAX_MODEL_LEN, Bench, Chaos, bench
from tests.server.server import Server, serve
from tests.tiers import Tier
from vllm_trimix.cli.main import main
from vllm_trimix.config import DEFAULT_MIN_PROMPT_LEN
from vllm_trimix.demo.prompts import make_demo_prompt

WAVE = ("long", "long", "short", "opted-out", "straddling")
"""Clients, two at a time, in this order again and again."""
AT_ONCE = 2
CLIENT_SECONDS = 600.0
"""The most that one client may take."""


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
    server: Server, model: Path, folder: Path, seconds: float
) -> tuple[list[tuple[Bench, dict[str, Any]]], Chaos]:
    """Clients for about this long, and one that misbehaves beside them."""
    chaos, stop = Chaos(server.port), threading.Event()
    thread = threading.Thread(target=chaos.run, args=(stop,), kwargs={"seconds": seconds + 2 * CLIENT_SECONDS})
    end = time.monotonic() + seconds
    done: list[tuple[Bench, dict[str, Any]]] = []
    thread.start()
    try:
        for turn in range(1000):
            if time.monotonic() > end:
                break
            with contextlib.ExitStack() as stack:
                names = [WAVE[(AT_ONCE * turn + number) % len(WAVE)] for number in range(AT_ONCE)]
                clients = [
                    stack.enter_context(bench(server.port, model, name, folder, seed=AT_ONCE * turn + number))
                    for number, name in enumerate(names)
                ]
                done += [(client, client.finish(CLIENT_SECONDS)) for client in clients]
            assert server.process.poll() is None, server.log[-5000:]
    finally:
        stop.set()
        thread.join(CLIENT_SECONDS)
    return done, chaos


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.tier("H")
def test_soak(model: Path, tmp_path: Path, tier: Tier, record_property: Any) -> None:
    seconds = tier.size(sample=75, full=600)
    arguments = ("--enable-logging-iteration-details", "--max-num-batched-tokens=2048")
    trimix, log = {"stats_log_interval": 1.0}, tmp_path / "server.log"
    with serve(model, log, trimix=trimix, arguments=arguments, start_timeout=900) as server:
        prompts = golden_prompts()
        # Once to warm up, or what is compiled and cached at first use counts as growth.
        assert counts.golden(server, prompts, "warm") == counts.golden(server, prompts, "before")
        before = counts.golden(server, prompts, "also-before")
        idle = counts.wait_idle(server, 60)
        assert idle["vllm:kv_cache_usage_perc"] == 0
        start, memory = counts.rows(server), counts.memory(server)
        assert start.sparse > 0

        clients, chaos = drive(server, model, tmp_path, seconds)

        after = counts.wait_idle(server, 120)
        end = counts.rows(server)
        grown = counts.memory(server) - memory
        figures = summary(clients, chaos, start, end, memory, grown, after)
        record_property("soak", json.dumps(figures))
        print(json.dumps(figures, indent=1))

        assert chaos.unexpected == []
        assert [status for (_, status) in chaos.statuses if status.startswith("5")] == []
        assert all(result["failed"] == 0 for _, result in clients)
        assert figures["long share"] >= 0.4
        assert figures["triangle requests"] >= 0.4 * figures["bench requests"]
        assert end.cached - start.cached < 0.05 * (end.scheduled - start.scheduled), "mostly cached: hardly any prefill"

        # Row by row, over everything since the start: disconnects, refusals and opt-outs among it.
        assert end.steps[0] == end.steps[1], "vLLM did not log every step: its count is not complete"
        assert end.sparse + end.dense + end.cached == end.scheduled + end.hits
        assert end.cached == end.hits
        assert end.tracked == 0

        assert after["vllm:kv_cache_usage_perc"] == 0
        assert grown < 0.1 * memory + 2**27, f"{grown / 2**20:.0f} MiB of {memory / 2**20:.0f} more than before"
        assert counts.golden(server, prompts, "after") == before
        assert "Traceback" not in server.log
    assert server.process.returncode in (0, -2, 130), server.log[-2000:]
    for client, result in clients:
        for number in range(result["completed"]):
            is_sparse = client.kind.trimix == "on" and client.kind.lengths[number % len(client.kind.lengths)] >= 4096
            straddles = is_sparse and client.name == "straddling"
            tier.case("request", str(client.result), number, triangle=is_sparse, straddling=straddles)
    for (name, status), count in chaos.statuses.items():
        for number in range(count):
            tier.case("chaos", name, status, number)


def summary(
    clients: list[tuple[Bench, dict[str, Any]]],
    chaos: Chaos,
    start: counts.Rows,
    end: counts.Rows,
    memory: int,
    grown: int,
    after: dict[str, float],
) -> dict[str, Any]:
    """The figures that a report quotes."""
    requests = [
        (client.kind.lengths[number % len(client.kind.lengths)], client.kind.trimix)
        for client, _ in clients
        for number in range(client.kind.count)
    ]
    sparse = [length for length, trimix in requests if trimix == "on" and length >= DEFAULT_MIN_PROMPT_LEN]
    by_status: Counter[str] = Counter()
    for (_, status), count in chaos.statuses.items():
        by_status[status] += count
    return {
        "clients": len(clients),
        "bench requests": sum(result["completed"] for _, result in clients),
        "bench prompt tokens": sum(result["total_input_tokens"] for _, result in clients),
        "bench generated tokens": sum(result["total_output_tokens"] for _, result in clients),
        "triangle requests": len(sparse),
        "long share": round(sum(length >= 4096 for length, _ in requests) / len(requests), 3),
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
        kind.lengths[number % len(kind.lengths)] >= DEFAULT_MIN_PROMPT_LEN
        for kind in mix
        if kind.trimix == "on"
        for number in range(kind.count)
    )
    assert sparse / total > 0.5
    assert max(max(kind.lengths) for kind in mix) < MAX_MODEL_LEN
