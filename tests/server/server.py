"""A real ``vllm serve`` in processes of its own, as users start it."""

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
from pathlib import Path
from typing import Any

import httpx

from tests.cpu import fast_dtype
from tests.engine.run import logged_rows


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Server:
    """A running server and its log."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log_path = process, port, log
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def rows(self) -> dict[str, int]:
        """Totals of the periodic ``TRIMIX rows:`` lines, after the pending one has been written."""
        time.sleep(1.5)
        totals: dict[str, int] = {}
        for line in logged_rows(self.log):
            for key, value in line.items():
                totals[key] = value if key == "requests" else totals.get(key, 0) + value
        return totals

    def post(self, path: str, body: dict[str, Any]) -> httpx.Response:
        return self.client.post(path, json={"model": "demo", **body})

    def complete(self, prompt: str, *, trimix: Any = None, max_tokens: int = 8, **body: Any) -> dict[str, Any]:
        """One greedy completion; returns ``text``, ``prompt_tokens``, ``cached_tokens``."""
        if trimix is not None:
            body["vllm_xargs"] = {"trimix": trimix}
        response = self.post("/v1/completions", {"prompt": prompt, "max_tokens": max_tokens, "temperature": 0, **body})
        assert response.status_code == 200, response.text
        answer = response.json()
        return {
            "text": answer["choices"][0]["text"].strip(),
            "prompt_tokens": answer["usage"]["prompt_tokens"],
            "cached_tokens": (answer["usage"].get("prompt_tokens_details") or {}).get("cached_tokens", 0),
        }


@contextlib.contextmanager
def serve(
    model: Path,
    log: Path,
    *,
    trimix: dict[str, Any] | None,
    arguments: tuple[str, ...] = (),
    backend: str = "TRIMIX",
    start_timeout: float = 600,
) -> Iterator[Server]:
    """Starts ``vllm serve``, waits until it is healthy, and stops it with Ctrl-C's signal."""
    port = free_port()
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(model),
        "--served-model-name=demo",
        f"--attention-backend={backend}",
        f"--port={port}",
        "--host=127.0.0.1",
        f"--dtype={fast_dtype()}",
        "--max-model-len=18432",
        "--enforce-eager",
        "--enable-prompt-tokens-details",
        *arguments,
    ]
    if trimix is not None:
        command.append("--additional-config=" + json.dumps({"trimix": trimix}))
    # As many threads as vLLM chooses, however many the tests may have.
    inherited = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    env = inherited | {"VLLM_CPU_KVCACHE_SPACE": "2", "PYTHONUNBUFFERED": "1"}
    with open(log, "wb") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
    server = Server(process, port, log)
    try:
        deadline = time.monotonic() + start_timeout
        while True:
            assert process.poll() is None, server.log[-5000:]
            assert time.monotonic() < deadline, server.log[-5000:]
            with contextlib.suppress(httpx.TransportError):
                if server.client.get("/health").status_code == 200:
                    break
            time.sleep(0.5)
        yield server
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
        finally:
            server.client.close()
