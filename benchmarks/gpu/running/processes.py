"""Runs a command with a time limit and leaves nothing of it behind, whatever it started."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import psutil

_PR_SET_CHILD_SUBREAPER = 36
_GRACE_SECONDS = 5.0


class Terminated(BaseException):
    """This process was told to end. No ``Exception``: nothing may take it for a failed stage."""


def adopt_orphans() -> None:
    """Makes processes whose parent dies children of this one (Linux), so that ``end_descendants`` finds them.

    Servers lead sessions of their own, which a signal to a stage's process group would not reach.
    """
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER) failed")


@contextlib.contextmanager
def terminable() -> Iterator[None]:
    """Raises ``Terminated`` on SIGTERM and SIGHUP, so that both clean up as Ctrl-C does; nohup's wish is kept."""

    def stop(number: int, frame: object) -> None:
        raise Terminated(signal.Signals(number).name)

    heard = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    saved = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        for number, handler in saved.items():
            signal.signal(number, handler)


def run_limited(command: Sequence[str], *, log: Path, limit: float) -> int | None:
    """Runs a command in a session of its own and ends everything it started, also when this process is interrupted.

    Args:
        command: Program and arguments.
        log: Where its output is appended.
        limit: Seconds it may take.

    Returns:
        Its exit status; None if it ran past the limit.
    """
    try:
        with open(log, "ab") as file:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
    finally:
        end_descendants()


def end_descendants(grace: float = _GRACE_SECONDS) -> None:
    """Ends every process below this one: asked first, so that shared memory is freed, then killed."""
    # Here, so that a machine without vLLM, which brings it, gets as far as a clear message.
    import psutil

    deadline = time.monotonic() + grace
    asked: set[int] = set()
    while alive := _alive():
        late = time.monotonic() > deadline
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess):
                if late:
                    process.kill()
                elif process.pid not in asked:
                    asked.add(process.pid)
                    process.terminate()
                    # A stopped process handles nothing until it is continued.
                    process.resume()
        psutil.wait_procs(alive, timeout=0.2)


def _alive() -> list[psutil.Process]:
    # May be missing where the runner starts; a stage's interpreter has it.
    import psutil

    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_ZOMBIE:
                # Reaps it if it is ours; its parent does otherwise.
                with contextlib.suppress(psutil.TimeoutExpired):
                    process.wait(0)
            else:
                found.append(process)
    return found
