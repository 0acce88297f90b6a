"""Processes forked from this one that take turns, so that what else the machine does meets all of them alike.

What they share is imported once, before they fork. Between two messages a fork waits on a pipe and uses no processor.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import traceback
from collections.abc import Callable
from typing import Any

Answer = Callable[[Any], Any]
"""Answers one message; both are JSON."""


class Fork:
    """One forked process.

    Attributes:
        pid: Its process id.
    """

    def __init__(self, make: Callable[[], Answer]) -> None:
        """Forks; the fork calls ``make`` and then answers messages until it is stopped."""
        asked, self._ask = os.pipe()
        self._answers, answered = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._ask)
            os.close(self._answers)
            try:
                _answer(make, asked, answered)
            except BaseException:
                traceback.print_exc()
            finally:
                # Not the parent's own clean-up.
                os._exit(1)
        os.close(asked)
        os.close(answered)
        self._lines = os.fdopen(self._answers)

    def ask(self, message: Any) -> Any:
        """The answer to a message.

        Raises:
            RuntimeError: The process has ended; its traceback is on stderr.
        """
        with contextlib.suppress(BrokenPipeError):
            os.write(self._ask, json.dumps(message).encode() + b"\n")
        line = self._lines.readline()
        if not line:
            raise RuntimeError(f"process {self.pid} ended without an answer; what it wrote to stderr says why")
        return json.loads(line)

    def stop(self) -> None:
        """Kills it."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._ask)
        self._lines.close()


def _answer(make: Callable[[], Answer], asked: int, answered: int) -> None:
    with os.fdopen(asked) as messages, os.fdopen(answered, "w", buffering=1) as answers:
        answer = make()
        for line in messages:
            answers.write(json.dumps(answer(json.loads(line))) + "\n")
