"""Starts the servers that benchmarks compare, and asks them one streamed completion at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx


@dataclass(frozen=True)
class Configuration:
    """A named server configuration.

    Attributes:
        name: How results call it.
        trimix: The ``trimix`` entry; None serves stock vLLM with the plugin not loaded.
        arguments: More ``vllm serve`` arguments.
    """

    name: str
    trimix: dict[str, Any] | None
    arguments: tuple[str, ...] = ()


@dataclass
class Timing:
    """One streamed completion: seconds to the first token, and from each to the next on average."""

    ttft: float
    itl: float
    prompt_tokens: int


@dataclass
class Server:
    """A running server."""

    configuration: Configuration
    port: int
    process: subprocess.Popen[bytes]
    log: Path
    client: httpx.Client = field(init=False)

    def __post_init__(self) -> None:
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=900)

    def ask(self, prompt: list[int], *, max_tokens: int) -> Timing:
        """One greedy completion of token ids, streamed.

        Raises:
            RuntimeError: The server answered an error, or counted other prompt tokens than were sent.
        """
        body = {
            "model": "bench",
            "prompt": prompt,
            "max_tokens": max_tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        stamps, tokens = [], 0
        start = time.perf_counter()
        with self.client.stream("POST", "/v1/completions", json=body) as response:
            if response.status_code != 200:
                raise RuntimeError(f"{self.configuration.name}: HTTP {response.status_code} {response.read()!r}")
            for line in response.iter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.perf_counter()
                event = json.loads(line[6:])
                if event.get("choices"):
                    stamps.append(now)
                elif event.get("usage"):
                    tokens = event["usage"]["prompt_tokens"]
        if tokens != len(prompt):
            raise RuntimeError(f"{self.configuration.name}: sent {len(prompt)} prompt tokens, the server saw {tokens}")
        # From first to last over the tokens between: events may carry several tokens.
        return Timing(stamps[0] - start, (stamps[-1] - stamps[0]) / max(1, max_tokens - 1), tokens)

    @contextlib.contextmanager
    def awake(self) -> Iterator[None]:
        """Lets the server run for one measurement; outside, it is stopped, so that its polling costs others nothing."""
        os.killpg(self.process.pid, signal.SIGCONT)
        # Let what piled up meanwhile (timers, heartbeats) pass.
        time.sleep(0.3)
        try:
            yield
        finally:
            os.killpg(self.process.pid, signal.SIGSTOP)

    def peak_memory(self) -> int:
        """Resident bytes of all the server's processes now."""
        found = subprocess.run(
            ["ps", "-o", "rss=", "--sid", str(self.process.pid)], capture_output=True, text=True, check=True
        )
        return 1024 * sum(map(int, found.stdout.split()))


@contextlib.contextmanager
def serve(
    configuration: Configuration, model: Path, directory: Path, *, max_model_len: int, cpus: str, arguments: list[str]
) -> Iterator[Server]:
    """Starts one server and stops it with the signal of Ctrl-C.

    Args:
        configuration: What to serve.
        model: Checkpoint or bench shape.
        directory: Where its log goes.
        max_model_len: In tokens.
        cpus: Cores of the worker on CPU machines, e.g. ``0``.
        arguments: ``vllm serve`` arguments common to all configurations.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model),
        "--served-model-name=bench",
        "--host=127.0.0.1",
        f"--port={port}",
        f"--max-model-len={max_model_len}",
        "--no-enable-prefix-caching",
        *arguments,
        *configuration.arguments,
    ]
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": cpus, **os.environ}
    if configuration.trimix is None:
        # An allowlist that names no plugin: stock is stock.
        env["VLLM_PLUGINS"] = ""
    else:
        command += ["--attention-backend=TRIMIX", "--additional-config=" + json.dumps({"trimix": configuration.trimix})]
    log = directory / f"{configuration.name}.log"
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    server = Server(configuration, port, process, log)
    try:
        deadline = time.monotonic() + 900
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{configuration.name} did not start:\n{log.read_text(errors='replace')[-4000:]}")
            with contextlib.suppress(httpx.TransportError):
                if server.client.get("/health").status_code == 200:
                    break
            time.sleep(0.5)
        text = log.read_text(errors="replace")
        if ("TRIMIX: layers=" in text) is (configuration.trimix is None):
            raise RuntimeError(f"{configuration.name}: its log does not show the backend it was asked to run")
        yield server
    finally:
        server.client.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGCONT)
            os.killpg(process.pid, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
