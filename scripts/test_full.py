"""Runs what ``make test`` only samples or leaves out: every tier of the test matrix in full, then the slow tests.

One pytest process a stage. A stage that passed is not run again while the sources are the same, so that an interrupted
run goes on where it was. What the tiers checked is left in ``build/tiers.json``. Arguments are handed to pytest; a run
with any is a run of its own: it remembers nothing, and a tier that they leave empty is no failure.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from tests.tiers import TIERS, shortcomings  # noqa: E402  The path must be set first.

STATE = ROOT / "build" / "test-full.json"
REPORT = ROOT / "build" / "tiers.json"
SLOW = "slow"
MINUTES = 100
"""What a full run may take."""
TEST_BY_TEST = "ABCD"
"""Tiers whose tests are drawn cases that share nothing: their workers take tests from one another, not files."""
ALONE = "HJ"
"""Tiers that load the machine, or time it: one process."""
_NO_TESTS = 5
_NOT_SOURCES = {".git", ".venv", "build", "dist", "__pycache__"}


def source_key(root: Path) -> str:
    """Changes with any file that git tracks or would track; outside a checkout with any file but what is built."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    # A folder inside another checkout, which ignores it, is no checkout of its own.
    top = _git(["git", "rev-parse", "--show-toplevel"], root)
    listed = _git(command, root) if top is not None and Path(top.strip()).resolve() == root.resolve() else None
    if listed is None:
        found = [Path(folder, name) for folder, _, names in _walk(root) for name in names]
        names = sorted(str(path.relative_to(root)) for path in found)
    else:
        names = sorted({name for name in listed.split("\0") if name})
    digest = hashlib.sha256(sys.version.encode())
    for name in names:
        path = root / name
        if path.is_file():
            digest.update(f"{name}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()


def _git(command: list[str], root: Path) -> str | None:
    try:
        result = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return result.stdout if result.returncode == 0 else None


def _walk(root: Path) -> list[tuple[str, list[str], list[str]]]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in _NOT_SOURCES]
        found.append((folder, folders, names))
    return found


def passed_before(key: str) -> dict[str, dict[str, Any]]:
    """Stages that passed on these sources: seconds, and a tier's entry of ``tiers.json``."""
    try:
        state = json.loads(STATE.read_text())
    except (OSError, ValueError):
        return {}
    return dict(state["passed"]) if state.get("sources") == key else {}


def _write(path: Path, content: object) -> None:
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(path)


def run_stage(stage: str, arguments: Sequence[str]) -> tuple[list[str], dict[str, Any] | None]:
    """Runs a tier, or the slow tests that belong to none.

    Returns:
        What is wrong, one line each, and a tier's entry of ``tiers.json``.
    """
    chosen = ["--tier", "none", "-m", SLOW] if stage == SLOW else ["--full", "--tier", stage]
    spread = "worksteal" if stage in TEST_BY_TEST else "loadfile"
    count = "0" if stage in ALONE else os.environ.get("TEST_WORKERS", "2")
    workers = ["-n", count, "--dist", spread, "--no-loadscope-reorder"]
    command = [sys.executable, "-m", "pytest", *chosen, "--basetemp=build/pytest", *workers, *arguments]
    with subprocess.Popen(command, cwd=ROOT) as process:
        try:
            status = process.wait()
        except KeyboardInterrupt:
            # It got the same signal, and has engines of its own to end.
            process.wait()
            raise
    faults = [] if status in (0, _NO_TESTS) else [f"pytest ended with status {status}"]
    if stage == SLOW:
        return faults + (["there is no slow test"] if status == _NO_TESTS and not arguments else []), None
    entry = json.loads(REPORT.read_text()).get(stage) if REPORT.exists() else None
    if entry is None and arguments:
        return faults, None
    return faults + shortcomings(entry), entry


def main(arguments: Sequence[str]) -> int:
    """Runs the stages that have not passed yet; 1 when any fails."""
    key = source_key(ROOT)
    passed = {} if arguments else passed_before(key)
    _write(REPORT, {stage: found["tier"] for stage, found in passed.items() if found["tier"]})
    lines, failed = [], False
    for stage in (*TIERS, SLOW):
        title = f"tier {stage}" if stage in TIERS else "slow tests"
        if stage in passed:
            lines.append(f"{title}: passed before on these sources, in {passed[stage]['seconds']:.0f} s")
            continue
        print(f"\ntest-full: {title}: {TIERS.get(stage, 'those of no tier')}", flush=True)
        start = time.monotonic()
        try:
            faults, entry = run_stage(stage, arguments)
        except KeyboardInterrupt:
            print(f"\ntest-full: stopped in {title}; the next run goes on there", flush=True)
            return 130
        seconds = time.monotonic() - start
        cases = f"{entry['cases']} cases in " if entry else ""
        lines.append(f"{title}: {cases}{seconds:.0f} s, {'; '.join(faults) or 'passed'}")
        print(f"test-full: {lines[-1]}", flush=True)
        if faults:
            failed = True
        else:
            passed[stage] = {"seconds": seconds, "tier": entry}
            if not arguments:
                _write(STATE, {"sources": key, "passed": passed})
    total = sum(found["seconds"] for found in passed.values()) / 60
    lines.append(f"{total:.0f} minutes in what passed; a full run may take {MINUTES}")
    print("\ntest-full: " + "\ntest-full: ".join(["FAILED" if failed else "passed", *lines]), flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
