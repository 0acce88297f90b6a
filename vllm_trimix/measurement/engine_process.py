"""The other end of ``backend/engines/job.py``: starts an engine, asks it, and leaves no process behind."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from vllm_trimix.measurement import stopping
from vllm_trimix.measurement.hardware import usable_cpu

_LAST_LINES = 12
_GRACE_SECONDS = 10.0
# How often a waiting reader looks whether the process is still there.
_POLL_SECONDS = 0.5


class EngineProcess:
    """An engine and its log. Leaving the context ends every process of it.

    The engine has a session of its own: Ctrl-C in a terminal reaches the command only, which then ends the engine, as
    it does after other signals. If the command is killed, the engine sees the end of its input, and goes too.
    """

    def __init__(
        self,
        module: str,
        job: dict[str, Any],
        *,
        left: Callable[[], float] = lambda: math.inf,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Starts the process.

        Args:
            module: One that calls ``job.serve``.
            job: What its ``configure`` takes.
            left: Seconds that may still be waited for an answer.
            environment: Variables on top of this process's.
        """
        self._job, self._left = job, left
        descriptor, log = tempfile.mkstemp(prefix="vllm-trimix-engine-", suffix=".log")
        self.log_path = Path(log)
        replies, theirs = os.pipe()
        # What ran is read from the log, so that it must say it.
        variables = {**os.environ, "VLLM_LOGGING_LEVEL": "INFO", "VLLM_CONFIGURE_LOGGING": "1"}
        # A measurement is no usage.
        variables["VLLM_NO_USAGE_STATS"] = "1"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs)],
                stdin=subprocess.PIPE,
                stdout=descriptor,
                stderr=subprocess.STDOUT,
                pass_fds=(theirs,),
                env={**variables, **(environment or {})},
                start_new_session=True,
            )
        finally:
            os.close(descriptor)
            os.close(theirs)
        self._handlers = stopping.raise_on_signals()
        self._replies = replies
        self._unread = b""
        self._is_idle = False

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()
        # The log is named in the error of an engine that died; nobody needs it otherwise.
        if not isinstance(error, EngineDied):
            self.log_path.unlink(missing_ok=True)

    @property
    def log(self) -> str:
        """What vLLM has logged so far."""
        return self.log_path.read_text(errors="replace")

    def wait_ready(self) -> dict[str, Any]:
        """Hands the job over; returns what the engine says once it can be asked.

        Raises:
            ValueError: The model, the flags or the entry are wrong.
            TimeoutError: Not ready in the time left.
            EngineDied: It ended.
        """
        self._send(self._job)
        answer = self._receive()
        if "error" in answer:
            raise ValueError(answer["error"])
        if answer["ready"].get("hardware") is None:
            answer["ready"]["hardware"] = usable_cpu()
        return answer

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """The answer to a message.

        Raises:
            TimeoutError: No answer in the time left.
            EngineDied: It ended.
        """
        self._send(message)
        return self._receive()

    def wait_for_log(self, pattern: str, seconds: float) -> re.Match[str] | None:
        """The first match in the log, which may be written some time after what it reports."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.log)
            if found or time.monotonic() > deadline:
                return found
            time.sleep(0.1)

    def stop(self) -> None:
        """Ends every process of the engine: gently, then by force. A second Ctrl-C meanwhile doesn't prevent it."""
        with stopping.held_off():
            # The end of its input ends an engine that is idle, with all that it cleans up behind it.
            with contextlib.suppress(OSError):
                self._stdin.close()
            if self._is_idle:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    self._process.wait(_GRACE_SECONDS)
            self._signal(signal.SIGTERM)
            if not self._is_gone_within(_GRACE_SECONDS):
                self._signal(signal.SIGKILL)
            self._process.wait()
            os.close(self._replies)
        stopping.restore(self._handlers)

    def _is_gone_within(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while True:
            if not _lives(self._process.pid):
                return True
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)

    def _signal(self, number: int) -> None:
        """Signals all its processes, those that are left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    @property
    def _stdin(self) -> Any:
        assert self._process.stdin is not None
        return self._process.stdin

    def _send(self, message: dict[str, Any]) -> None:
        self._is_idle = False
        try:
            self._stdin.write(json.dumps(message).encode() + b"\n")
            self._stdin.flush()
        except BrokenPipeError:
            raise self._death() from None

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + self._left()
        while b"\n" not in self._unread:
            readable, _, _ = select.select([self._replies], [], [], _POLL_SECONDS)
            chunk = os.read(self._replies, 65536) if readable else b""
            self._unread += chunk
            # Its children may hold the pipe open after its death: the end of the pipe alone would not show it.
            if not chunk and (readable or self._process.poll() is not None):
                raise self._death()
            if time.monotonic() > deadline and b"\n" not in self._unread:
                raise TimeoutError
        line, _, self._unread = self._unread.partition(b"\n")
        self._is_idle = True
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _death(self) -> EngineDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_GRACE_SECONDS)
        lines = [line for line in self.log.splitlines() if line.strip()]
        return EngineDied(self._process.returncode, lines[-_LAST_LINES:], cause(lines), self.log_path)


def _lives(group: int) -> bool:
    """Whether a process group has a process that is no zombie: in a container nobody may collect those."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # After the command's name, which may hold anything: state, parent, group.
            state, _, its_group = stat.read_text(errors="replace").rpartition(")")[2].split()[:3]
            if int(its_group) == group and state not in "ZX":
                return True
    return False


class EngineDied(Exception):
    """The engine ended by itself.

    Attributes:
        last_lines: The end of its log.
    """

    def __init__(self, status: int | None, last_lines: list[str], cause: str | None, log: Path) -> None:
        super().__init__(
            f"the engine ended (status {status}){': ' + cause if cause else ''}; the whole log is in {log}"
        )
        self.last_lines = last_lines


def cause(lines: list[str]) -> str | None:
    """The first exception in a log: those after it are about processes that missed the one that died."""
    for line in lines:
        # A log line's own prefix (process, level, time, file) may come before the exception.
        found = re.search(r"(?:^|\] |\) )((?:\w+\.)*[A-Z]\w*(?:Error|Exception|Interrupt): .+)", line)
        if found:
            return found[1][:400]
    return None
