"""The table of what all stages saw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.report import load, write_atomically

if TYPE_CHECKING:
    from benchmarks.gpu.runner import Stage

_MOST_LETTERS = 240


def write_summary(output: Path, stages: Sequence[Stage], environment: dict[str, Any], *, left: Sequence[str]) -> None:
    """Writes ``summary.md`` from the result files, those of earlier runs included.

    Args:
        output: Folder of the result files.
        stages: All stages there are.
        environment: Of this run.
        left: Stages that the budget left no time for.
    """
    lines = [_machine(environment), "", "| stage | status | seconds | seen |", "|---|---|---|---|"]
    for stage in stages:
        result = load(output / f"{stage.name}.json")
        if result is None:
            lines.append(f"| {stage.name} | {'left' if stage.name in left else 'not run'} | | {stage.summary} |")
            continue
        same = result["environment"].get("commit") == environment.get("commit")
        seen = " ".join(result["seen"].split()).replace("|", "\\|")
        seen = seen if len(seen) <= _MOST_LETTERS else seen[: _MOST_LETTERS - 3] + "..."
        note = "" if same else f" (commit {result['environment'].get('commit')})"
        lines.append(f"| {stage.name} | {result['status']} | {result['seconds']:.0f} | {seen}{note} |")
    write_atomically(output / "summary.md", "\n".join(lines) + "\n")


def _machine(environment: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in environment.get("versions", {}).items())
    device = environment.get("gpu") or environment.get("cpu") or environment["device"]
    return f"{device}; {versions}; {environment.get('date')}; commit {environment.get('commit')}"
