"""What tests of the GPU run's failures share: a report as a stage gets it, and a program in place of the sanitizer."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.report import Report, save


def make_report(tmp_path: Path, **settings: Any) -> Report:
    """Of the stage ``kernel_reference``, in a rehearsal."""
    path = tmp_path / "kernel_reference.json"
    environment = {"device": "cpu"}
    settings = {"toy": True, "device": "cpu", **settings}
    save(path, {"stage": "", "settings": settings, "environment": environment, "source": "", "checks": [], "seen": ""})
    return Report(path)


def fake_sanitizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Puts a shell script on PATH that writes its arguments to the file ``asked``."""
    program = tmp_path / "bin" / "compute-sanitizer"
    program.parent.mkdir(exist_ok=True)
    program.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" >{tmp_path}/asked\n{script}\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
