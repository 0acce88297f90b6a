"""The stage's end of ``child``: starts an engine, asks it, says what went wrong, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_trimix.measurement.engine_process import cause

_POLL_SECONDS = 0.2
_LETTERS = 300


class EngineLost(Exception):
    """An engine that can't be asked any more; the message names it and says why.

    Attributes:
        name: The engine's.
    """

    def __init__(self, name: str, why: str) -> None:
        super().__init__(f"{name} {why}")
        self.name = name


class Engine:
    """One engine process. Leaving the context ends every process of it.

    Attributes:
        name: What the results call it.
        facts: What it answered when it was ready.
    """

    def __init__(
        self,
        name: str,
        job: dict[str, Any],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        command: Sequence[str] = (sys.executable, "-m", "benchmarks.gpu.served.child"),
    ) -> None:
        """Starts the process and hands it the job; ``wait_ready`` waits for its answer.

        Args:
            name: What the results call it.
            job: As the child takes it.
            log: Where its output goes.
            environment: Variables on top of this process's.
            command: The child; gets the descriptor of its answers as its last argument.
        """
        self.name = name
        self.facts: dict[str, Any] = {}
        self._log = log
        self._answers, theirs = os.pipe()
        self._unread = b""
        try:
            with open(log, "wb") as output:
                self._process = subprocess.Popen(
                    [*command, str(theirs)],
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=(theirs,),
                    env={**os.environ, **(environment or {})},
                    start_new_session=True,
                )
        finally:
            os.close(theirs)
        self._send(job)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()

    def wait_ready(self, limit: float) -> None:
        """Waits until it can be asked.

        Raises:
            EngineLost: It ended, or was not ready after ``limit`` seconds.
        """
        self.facts = self._receive(limit, "was not ready")

    def ask(self, what: str, *, limit: float, **message: Any) -> dict[str, Any]:
        """The answer to a message.

        Raises:
            EngineLost: It ended, did not answer within ``limit`` seconds, or what it said is no answer.
        """
        self._send({"ask": what, **message})
        return self._receive(limit, "did not answer")

    def end(self) -> None:
        """Kills it: it holds nothing that must be kept."""
        if self._answers < 0:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        os.close(self._answers)
        self._answers = -1

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._lost(self._death()) from None

    def _receive(self, limit: float, failed: str) -> dict[str, Any]:
        deadline = time.monotonic() + limit
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._answers], [], [], _POLL_SECONDS)
            chunk = os.read(self._answers, 65536) if readable else b""
            self._unread += chunk
            # Its children may hold the pipe open after its death: the end of the pipe alone would not show it.
            if not chunk and (readable or self._process.poll() is not None):
                raise self._lost(self._death())
            if not chunk and time.monotonic() > deadline:
                raise self._lost(f"{failed} within {limit:.0f} s")
        line, _, self._unread = self._unread.partition(b"\n")
        try:
            answer = json.loads(line)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise self._lost(f"answered {line[:_LETTERS].decode(errors='replace')!r}, which is no JSON object")
        return answer

    def _death(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        lines = [line for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        why = cause(lines) or (lines[-1] if lines else "it logged nothing")
        return f"ended with status {self._process.returncode}: {why[:_LETTERS]}"

    def _lost(self, why: str) -> EngineLost:
        self.end()
        return EngineLost(self.name, f"{why}; its log is {self._log.name}")
