"""What a server is made to bear: the requests of ``vllm bench serve`` clients, and a client as bad as it can be."""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from vllm_trimix.demo.prompts import make_demo_prompt

MAX_MODEL_LEN = 18432


@dataclass(frozen=True)
class Kind:
    """Requests of one ``vllm bench serve`` client.

    Attributes:
        lengths: Prompt tokens, in turn.
        output: Tokens of each answer.
        count: Requests of one client.
        trimix: ``vllm_xargs.trimix``.
    """

    lengths: tuple[int, ...]
    output: int
    count: int
    trimix: str = "on"


KINDS = {
    "long": Kind((4200, 5000, 6100), 8, 6),
    "opted-out": Kind((4300, 1200), 8, 2, trimix="off"),
    "short": Kind((300, 900, 1800), 32, 6),
    "straddling": Kind((2 * 2048 + 64, 2 * 2048 + 100), 4, 4),
}
WAVE = ("long", "long", "short", "opted-out", "straddling")
"""Clients, some at a time, in this order again and again."""


def write_prompts(path: Path, kind: Kind, seed: int) -> None:
    """The data set of one client: documents that nobody has asked about before."""
    lines = []
    for number, length in zip(range(kind.count), itertools.cycle(kind.lengths)):
        prompt = make_demo_prompt(tokens=length, hops=1 + number % 2 if length > 1500 else 1, seed=1000 * seed + number)
        lines.append(json.dumps({"prompt": prompt.prompt}))
    path.write_text("\n".join(lines) + "\n")


@dataclass
class Chaos:
    """A client that leaves in mid-answer, and sends what no client should; in a thread, for a bounded time.

    Attributes:
        port: The server's.
        first: Number of its first turn, which its prompts follow from.
        statuses: HTTP status of each request by what it was; ``left`` where it didn't stay for one.
        unexpected: What should not have happened.
    """

    port: int
    first: int = 0
    statuses: Counter[tuple[str, str]] = field(default_factory=Counter)
    unexpected: list[str] = field(default_factory=list)

    def run(self, stop: threading.Event, *, seconds: float, pause: float = 1.0) -> None:
        """Takes its turns until ``stop`` or the end of its time."""
        deadline = time.monotonic() + seconds
        with httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=300) as client:
            for turn in itertools.count(self.first):
                for name, allowed, body, patience in self._requests(turn):
                    if stop.wait(pause) or time.monotonic() > deadline:
                        return
                    self._send(client, name, allowed, body, patience)

    def _send(
        self, client: httpx.Client, name: str, allowed: tuple[str, ...], body: Any, patience: float | None
    ) -> None:
        content = body if isinstance(body, bytes) else json.dumps({"model": "demo", **body}).encode()
        headers = {"content-type": "application/json"}
        timeout = 300 if patience is None else patience
        try:
            with client.stream("POST", "/v1/completions", content=content, headers=headers, timeout=timeout) as answer:
                status = str(answer.status_code)
                if name == "leaves in mid-answer" and status == "200":
                    next(answer.iter_lines(), None)
                    status = "left"
                else:
                    answer.read()
        except httpx.ReadTimeout:
            status = "left"
        except httpx.TransportError as error:
            status = type(error).__name__
        self.statuses[name, status] += 1
        if status not in allowed:
            self.unexpected.append(f"{name}: {status}")

    @staticmethod
    def _requests(turn: int) -> Iterator[tuple[str, tuple[str, ...], Any, float | None]]:
        """Name, statuses that stock vLLM may give too, body, and seconds that the client waits."""
        document = make_demo_prompt(tokens=6000, hops=2, seed=900_000 + turn).prompt
        brief = make_demo_prompt(tokens=300, hops=1, seed=910_000 + turn).prompt
        yield "leaves in mid-prefill", ("left", "200"), {"prompt": document, "max_tokens": 64}, 0.2 + turn % 5 * 0.3
        yield "bad choice", ("400",), {"prompt": brief, "max_tokens": 1, "vllm_xargs": {"trimix": "of"}}, None
        yield "bad type", ("400",), {"prompt": brief, "max_tokens": 1, "vllm_xargs": {"trimix": {"off": 1}}}, None
        yield "unknown key", ("400",), {"prompt": brief, "max_tokens": 1, "vllm_xargs": {"trimix_off": 1}}, None
        yield "forged stamp", ("400",), {"prompt": brief, "max_tokens": 1, "vllm_xargs": {"trimix_dense": "x"}}, None
        yield "huge choice", ("400",), {"prompt": brief, "vllm_xargs": {"trimix": "off" * 300_000}}, None
        yield "reserved salt", ("400",), {"prompt": brief, "cache_salt": "trimix-dense"}, None
        yield "giant prompt", ("400",), {"prompt": [5] * (3 * MAX_MODEL_LEN), "max_tokens": 1}, None
        yield "giant text", ("400",), {"prompt": "amber " * 300_000, "max_tokens": 1}, None
        yield "longest prompt", ("200",), {"prompt": [5 + turn % 50] * (MAX_MODEL_LEN - 1), "max_tokens": 1}, None
        yield "empty prompt", ("200", "400"), {"prompt": "", "max_tokens": 1}, None
        yield "no tokens", ("200", "400"), {"prompt": [], "max_tokens": 1}, None
        yield "token outside", ("200", "400"), {"prompt": [10**6], "max_tokens": 1}, None
        yield "no json", ("400", "422"), b'{"model": "demo", "prompt": "x"', None
        yield "opts out", ("200",), {"prompt": brief, "max_tokens": 4, "vllm_xargs": {"trimix": "off"}}, None
        yield "triangle only", ("200",), {"prompt": brief, "max_tokens": 4, "vllm_xargs": {"trimix": "triangle"}}, None
        yield "reads prompt rows", ("200",), {"prompt": brief, "max_tokens": 1, "prompt_logprobs": 1}, None
        yield "beam", ("200",), {"prompt": [5, 6, 7], "max_tokens": 3, "n": 2, "use_beam_search": True}, None
        yield "two at once", ("200",), {"prompt": [brief, document[:4000]], "max_tokens": 4, "n": 2}, None
        yield "leaves in mid-answer", ("left", "200"), {"prompt": brief, "max_tokens": 200, "stream": True}, None
