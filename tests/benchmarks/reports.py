"""Reports as the runner would hand them to the stages of ``run_all.sh``, and what of them failed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Report, load, save
from benchmarks.gpu.stages import STAGES


def make_report(tmp_path: Path, name: str, *, device: str = "cuda", memory: float = 150e9, **settings: Any) -> Report:
    """A report as the runner would hand it to a stage."""
    stage = next(stage for stage in STAGES if stage.name == name)
    path = tmp_path / f"{name}.json"
    settings = {"toy": False, "device": device, "group": stage.group, **stage.settings, **settings}
    environment = {"device": device, "device_memory_bytes": memory}
    save(
        path,
        {
            "stage": name,
            "status": "running",
            "settings": settings,
            "environment": environment,
            "checks": [],
            "source": "",
        },
    )
    return Report(path)


def failed(tmp_path: Path, name: str) -> list[str]:
    result = load(tmp_path / f"{name}.json")
    assert result is not None
    return [check["name"] for check in result["checks"] if not check["passed"]]
