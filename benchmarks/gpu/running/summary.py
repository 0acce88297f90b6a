"""The table of what all stages saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import load
from benchmarks.gpu.stage import Stage

_MOST_LETTERS = 900


def summary(output: Path, stages: Sequence[Stage], environment: dict[str, Any], *, left: Sequence[str]) -> str:
    """The table, in Markdown, from the result files, those of earlier runs included.

    Args:
        output: Folder of the result files.
        stages: All stages there are.
        environment: Of this run.
        left: Stages that the budget left no time for.
    """
    lines = [_machine(environment), "", "| stage | status | seconds | on the device | seen |", "|---|---|---|---|---|"]
    for stage in stages:
        result = load(output / f"{stage.name}.json")
        if result is None:
            lines.append(f"| {stage.name} | {'left' if stage.name in left else 'not run'} | | | {stage.summary} |")
            continue
        same = result["environment"].get("commit") == environment.get("commit")
        seen = " ".join(result["seen"].split()).replace("|", "\\|")
        seen = seen if len(seen) <= _MOST_LETTERS else seen[: _MOST_LETTERS - 3] + "..."
        note = "" if same else f" (commit {result['environment'].get('commit')})"
        device = f"{result['device_seconds']:.1f}" if "device_seconds" in result else ""
        lines.append(f"| {stage.name} | {result['status']} | {result['seconds']:.0f} | {device} | {seen}{note} |")
    return "\n".join(lines) + "\n"


def _machine(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    device = environment.get("gpu") or environment.get("cpu") or environment["device"]
    return f"{device}; {versions}; {environment.get('date')}; commit {environment.get('commit')}"
