"""The call of a stage: a process with a log, ended as Ctrl-C ends it, and a mark once it is done."""

from __future__ import annotations

import json
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

_COMMAND = "vllm_trimix.cli.main"
_STOP_SECONDS = 120
"""Until a stopped command must have ended its engines."""


def call(output: Path, name: str, words: Sequence[str], *, seconds: float | None) -> int | None:
    """Runs a stage, and marks it as done where that succeeds.

    Args:
        output: Folder of all results.
        name: Of the stage.
        words: For ``vllm-trimix``; or a module, with dots in its name, and what is for it.
        seconds: That there are; None for no end.

    Returns:
        The exit status; None where the time was over first.
    """
    path = log(output, name)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{shlex.join(words)}\n")
        file.flush()
        child = subprocess.Popen(
            [sys.executable, "-m", *([] if "." in words[0] else [_COMMAND]), *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            # Ctrl-C is passed on below, once.
            start_new_session=True,
        )
        try:
            status = child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(child)
    if status == 0:
        _mark(output, name).write_text(json.dumps(list(words)) + "\n")
    return status


def is_done(output: Path, name: str, words: Sequence[str]) -> bool:
    """Whether a stage is done, by this very call."""
    path = _mark(output, name)
    return path.exists() and path.read_text() == json.dumps(list(words)) + "\n"


def log(output: Path, name: str) -> Path:
    """What a stage printed."""
    return output / "logs" / f"{name}.log"


def _mark(output: Path, name: str) -> Path:
    """Holds the call of a stage that is done; a file a stage, so that two may run side by side."""
    return output / "logs" / f"{name}.done"


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ends the command as Ctrl-C does, so that it ends its engine and keeps what was said."""
    if child.poll() is not None:
        return
    child.send_signal(signal.SIGINT)
    try:
        child.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
