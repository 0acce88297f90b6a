"""Asks servers round by round: one is awake at a time, and the next round asks in the reverse order."""

from __future__ import annotations

import contextlib
import functools
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.serving.configurations import STATS_SECONDS
from benchmarks.serving.prompts import RANDOM, write_dataset
from benchmarks.serving.rounds import KEY_COUNTERS, Rounds
from benchmarks.serving.servers import Server, ServerError

_WARM_UP = -1
_MAX_IDLE_CPU = 0.01


def measure(
    servers: list[Server],
    model: Path,
    todo: list[tuple[int, int]],
    rounds: Rounds,
    *,
    repeats: int,
    decode_tokens: int,
    prompts: str,
    scratch: Path,
    dynamic: set[str],
) -> None:
    """Asks every server, round by round; one warm-up round per length and concurrency, not kept.

    Args:
        servers: All up.
        model: Folder with the tokenizer.
        todo: Lengths and concurrencies.
        rounds: What is there, and where new ones go.
        repeats: Rounds per length and concurrency.
        decode_tokens: Tokens after the first.
        prompts: Their kind.
        scratch: Folder for prompts.
        dynamic: Configurations whose patterns choose keys: what they read is counted after each request.
    """
    # Heavy: it is vLLM's own.
    from benchmarks.serving.client import Load, ask

    log = servers[0].log.with_name("client.log")
    log.write_text("")
    for server in servers:
        with server.awake():
            pass
    missing = {load: [r for r in range(repeats) if not rounds.has(*load, r)] for load in todo}
    with tqdm(total=len(servers) * sum(1 + len(repeats) for repeats in missing.values()), unit="request") as bar:
        for (length, concurrency), left in missing.items():
            for repeat in (_WARM_UP, *left):
                # The same prompts for all servers, new ones each round.
                seed = zlib.crc32(f"{length},{concurrency},{repeat}".encode())
                dataset = None
                if prompts != RANDOM:
                    dataset = scratch / "prompts.jsonl"
                    write_dataset(prompts, model, dataset, length=length, count=concurrency, seed=seed)
                load = Load(length, concurrency, decode_tokens, seed, dataset)
                measurements: dict[str, dict[str, Any]] = {}
                idle = dict.fromkeys((server.name for server in servers), 0.0)
                for server in servers if repeat % 2 else servers[::-1]:
                    bar.set_description(f"{length} tokens x {concurrency}, {server.name}")
                    with _watched([other for other in servers if other is not server], idle), server.awake():
                        measurements[server.name] = _measurement(
                            server, functools.partial(ask, server, model, load, log), dynamic=server.name in dynamic
                        )
                    bar.update()
                for name, share in idle.items():
                    if share > _MAX_IDLE_CPU:
                        raise ServerError(f"{name}: used {100 * share:.1f}% of a core while another server was timed")
                    measurements[name]["idle_cpu"] = round(share, 4)
                if repeat != _WARM_UP:
                    key = {"length": length, "concurrency": concurrency, "repeat": repeat}
                    rounds.add({**key, "measurements": measurements})


def _measurement(server: Server, ask: Callable[[], dict[str, Any]], *, dynamic: bool) -> dict[str, Any]:
    """What asking an awake server gave, with its memory, and what its pattern read if that is counted."""
    server.reset_peak()
    log_start = server.log_size()
    found = {**ask(), "peak_memory_bytes": server.peak_memory(), "gpu_memory_bytes": server.gpu_memory()}
    if dynamic:
        # Untimed: until the line that counts this request is written.
        time.sleep(2 * STATS_SECONDS)
        counted = server.counters(log_start)
        found |= {key: counted[key] for key in KEY_COUNTERS}
    return found


@contextlib.contextmanager
def _watched(others: list[Server], idle: dict[str, float]) -> Iterator[None]:
    """Keeps the largest share of a core that each of the idle servers used meanwhile."""
    used, start = [other.cpu_seconds() for other in others], time.monotonic()
    yield
    for other, before in zip(others, used, strict=True):
        share = (other.cpu_seconds() - before) / (time.monotonic() - start)
        idle[other.name] = max(idle[other.name], share)
