"""What a stage saw, saved as it goes: a stage that is killed keeps what it had."""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_RESERVED = ("stage", "status", "seconds", "device_seconds", "environment", "settings", "source", "checks", "seen")
_POLL_SECONDS = 0.05


def waiting_file(path: Path) -> Path:
    """Beside a stage's result: there while the stage waits for the device to itself."""
    return path.with_suffix(".waiting")


def granted_file(path: Path) -> Path:
    """Beside a stage's result: for how many seconds it has the device to itself."""
    return path.with_suffix(".granted")


def write_atomically(path: Path, text: str) -> None:
    """Writes a file aside and renames it: a reader, or a later run, never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def save(path: Path, result: dict[str, Any]) -> None:
    """Writes a stage's result."""
    write_atomically(path, json.dumps(result, indent=1) + "\n")


def load(path: Path) -> dict[str, Any] | None:
    """A stage's result; None if there is none that can be read."""
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return result if isinstance(result, dict) else None


class Report:
    """The running stage's result file.

    Attributes:
        settings: The stage's settings.
        environment: What it runs on.
        source: Names the code that runs.
        device: ``cuda`` or ``cpu``.
        toy: Whether the sizes are those of a rehearsal.
        folder: The stage's own folder, for logs and the files of benchmarks it starts; exists.
    """

    def __init__(self, path: Path) -> None:
        result = load(path)
        if result is None:
            raise ValueError(f"{path}: no stage result to report to; stages are started by benchmarks.gpu.stages")
        self._path, self._result = path, result
        self.settings: dict[str, Any] = result["settings"]
        self.environment: dict[str, Any] = result["environment"]
        self.source: str = result["source"]
        self.device: str = self.settings["device"]
        self.toy: bool = self.settings["toy"]
        self.folder = path.with_suffix("")
        self.folder.mkdir(exist_ok=True)

    @property
    def cuda(self) -> bool:
        """Whether the stage runs on an NVIDIA GPU."""
        return self.device == "cuda"

    def check(self, name: str, passed: object, detail: str = "") -> bool:
        """Records whether something is as it must be; returns that."""
        self._result["checks"].append({"name": name, "passed": bool(passed), "detail": detail})
        self._save()
        print(f"{'ok' if passed else 'FAILED'}: {name}: {detail}", flush=True)
        return bool(passed)

    @contextlib.contextmanager
    def checking(self, name: str) -> Iterator[None]:
        """Records an exception inside as a failed check, so that what follows still runs."""
        try:
            yield
        except Exception as error:
            self.check(name, False, f"{type(error).__name__}: {error}"[-2000:])

    def figure(self, **figures: Any) -> None:
        """Records measured values under their names, at the top of the result."""
        taken = sorted(figures.keys() & set(_RESERVED))
        if taken:
            raise ValueError(f"figure: {', '.join(taken)} is a field of every result; choose another name")
        self._result.update(figures)
        self._save()

    def seen(self, line: str) -> None:
        """The one line of the summary."""
        self._result["seen"] = line
        self._save()

    def alone(self) -> float:
        """Waits until no other stage uses the device: what is timed comes behind this call, what prepares before it.

        Only stages whose ``use`` is ``prepared`` may call it, once.

        Returns:
            Seconds until the stage is ended.
        """
        flag = waiting_file(self._path)
        flag.touch()
        while flag.exists():
            time.sleep(_POLL_SECONDS)
        return float(granted_file(self._path).read_text())

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Counts the seconds inside as the device's own: kernels, not imports, engine starts or references."""
        started = time.monotonic()
        try:
            yield
        finally:
            self.add_device_seconds(time.monotonic() - started)

    def add_device_seconds(self, seconds: float) -> None:
        """As ``on_device``, for what another process measured."""
        self._result["device_seconds"] = round(self._result.get("device_seconds", 0.0) + seconds, 3)
        self._save()

    def skip(self, reason: str) -> None:
        """Records that the stage can't run here, and why."""
        self._result["status"] = "skipped"
        self.seen(reason)

    def _save(self) -> None:
        save(self._path, self._result)
