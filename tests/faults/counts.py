"""What a server says of itself: memory, KV cache, and rows by two counts that know nothing of one another."""

from __future__ import annotations

import contextlib
import os
import random
import re
import time
from typing import Any, NamedTuple

import psutil

from tests.engine.run import logged_rows
from tests.server.server import Server


def processes(server: Server) -> list[psutil.Process]:
    """The server's processes that are alive."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.Error):
            if os.getpgid(process.pid) == server.process.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def memory(server: Server) -> int:
    """Resident bytes of all its processes."""
    total = 0
    for process in processes(server):
        with contextlib.suppress(psutil.Error):
            total += process.memory_info().rss
    return total


def growth_over_equal_requests(server: Server, *, warm_up: int = 8, requests: int = 32, length: int = 5000) -> int:
    """Bytes that the server grows by over requests of one length, one after another, all new.

    Under mixed traffic caches of kernels grow with every new shape, stock vLLM's too, up to their bounds; requests of
    equal shapes show what a request itself leaves behind.
    """
    tokens = random.Random(length)
    before = 0
    for number in range(warm_up + requests):
        if number == warm_up:
            before = memory(server)
        prompt = [tokens.randrange(5, 60) for _ in range(length)]
        response = server.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, "temperature": 0})
        assert response.status_code == 200, response.text
    return memory(server) - before


def metrics(server: Server) -> dict[str, float]:
    """vLLM's own figures, summed over labels."""
    found: dict[str, float] = {}
    for name, value in re.findall(r"^(vllm:\w+)(?:\{.*\})? (\S+)$", server.client.get("/metrics").text, re.MULTILINE):
        found[name] = found.get(name, 0.0) + float(value)
    return found


class Rows(NamedTuple):
    """Rows since the server started, by TRIMIX's counters and by vLLM's scheduler.

    Attributes:
        sparse: Of the triangle.
        dense: All other computed rows, whatever the reason.
        cached: That needed no computing.
        tracked: Requests that are known now.
        scheduled: By vLLM's scheduler.
        hits: By vLLM's prefix cache.
        steps: Of the scheduler, as vLLM numbers them, and those that it logged.
    """

    sparse: int
    dense: int
    cached: int
    tracked: int
    scheduled: int
    hits: int
    steps: tuple[int, int]


def rows(server: Server) -> Rows:
    """Both counts of an idle server."""
    server.rows()
    log = server.log
    totals: dict[str, int] = {}
    for line in logged_rows(log):
        for key, value in line.items():
            totals[key] = value if key == "requests" else totals.get(key, 0) + value
    steps = re.findall(
        r"Iteration\((\d+)\): \d+ context requests, (\d+) context tokens, \d+ .*? (\d+) generation t", log
    )
    by_rule = ("last_n", "decode", "few_keys")
    return Rows(
        sparse=totals.get("triangle", 0),
        dense=totals.get("dense", 0) + sum(totals.get(key, 0) for key in by_rule),
        cached=totals.get("cached", 0),
        tracked=totals.get("requests", 0),
        scheduled=sum(int(context) + int(generation) for _, context, generation in steps),
        hits=int(metrics(server)["vllm:prefix_cache_hits_total"]),
        steps=(int(steps[-1][0]) + 1, len(steps)),
    )


def wait_idle(server: Server, seconds: float) -> dict[str, float]:
    """Waits until nothing runs or waits; returns vLLM's figures.

    They are those of the last step: a request of one token is sent so that there is one after the last answer.
    """
    deadline = time.monotonic() + seconds
    while True:
        server.complete("amber", max_tokens=1)
        found = metrics(server)
        busy = found["vllm:num_requests_running"] + found["vllm:num_requests_waiting"]
        if busy == 0:
            return found
        assert time.monotonic() < deadline, f"{busy:.0f} requests are still there"
        time.sleep(1)


def golden(server: Server, prompts: list[tuple[str, Any]], salt: str) -> list[list[int]]:
    """Tokens of each prompt's answer, asked alone, with a cold cache."""
    found = []
    for name, prompt in prompts:
        body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
        response = server.post("/v1/completions", {**body, "cache_salt": f"{salt}-{name}"})
        assert response.status_code == 200, response.text
        answer = response.json()
        assert not (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens"), "the cache was not cold"
        found.append(answer["choices"][0]["token_ids"])
    return found
