"""What a child process found, and what must hold of it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
# With this suffix the last rows of a prompt go to the dense kernel instead of ours.
STOCK_TAILS = "-stock_tails"
DENSE = ("FLASH_ATTN", "TRITON_ATTN", f"FLASH_ATTN{STOCK_TAILS}")
FLOAT32_EPS = 2.0**-23


class Child:
    """One process that drives every scenario, against one vLLM; any process may read its report."""

    def __init__(self, out: Path) -> None:
        """By where its report goes."""
        self._out, self._log, self._pid = out, out.with_suffix(".log"), out.with_suffix(".pid")
        self._process: psutil.Popen | None = None

    @classmethod
    def start(cls, out: Path, *, source: Path | None) -> Child:
        """Starts it.

        Args:
            out: Where the report goes.
            source: Folder with the vLLM to import; None is the installed one.
        """
        child = cls(out)
        path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
        with child._log.open("w") as log:
            child._process = psutil.Popen(
                # What runs in front of it goes first.
                ["nice", "-n", "10", sys.executable, "-m", "tests.backend.composition_child", str(out)],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), *path] if source else path)},
                stdout=log,
                stderr=subprocess.STDOUT,
            )
        part = child._pid.with_suffix(".part")
        part.write_text(str(child._process.pid))
        part.replace(child._pid)
        return child

    def report(self) -> dict[str, Any]:
        """Waits for the process, and reads its report."""
        self.wait()
        status = self._process.wait() if self._process else 0
        assert (status, self._out.exists()) == (0, True), self._log.read_text()[-6000:]
        report: dict[str, Any] = json.loads(self._out.read_text())
        return report

    def wait(self) -> None:
        """Until it has ended."""
        deadline = time.monotonic() + 900
        while not self._pid.exists() or self._runs():
            assert time.monotonic() < deadline, f"no report yet\n{self._log.read_text()[-6000:]}"
            time.sleep(0.2)

    def _runs(self) -> bool:
        try:
            process = self._process or psutil.Process(int(self._pid.read_text()))
            return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    def stop(self) -> None:
        """Ends it, where this process started it."""
        if self._process is not None:
            # psutil's Popen refuses to kill what has ended and was waited for.
            with contextlib.suppress(psutil.NoSuchProcess):
                self._process.kill()
            self._process.wait()


def crash(result: dict[str, Any]) -> str:
    """The traceback of a scenario that didn't come to its end, or nothing."""
    return str(result.get("crash", ""))


def wrong_rows(result: dict[str, Any]) -> list[str]:
    """Rows whose outputs are further from their fp64 definition than twice a plain fp32 run, plus one rounding.

    The dense truth must miss that budget by far on the triangle rows, or the run proves nothing.
    """
    problems = [*result["faults"]]
    rounding = FLOAT32_EPS * result["largest"]
    budgets = {kind: 2 * error + rounding for kind, error in result["plain_error"].items()}
    for kind, error in result["error"].items():
        # Not "error > budget": a NaN must be found.
        if not error <= budgets[kind]:
            problems.append(f"{kind} rows are {error} off, budget {budgets[kind]}")
    if not result["rows"].get("triangle") or not result["gap"] > 1000 * budgets["triangle"]:
        problems.append(f"{result['rows']} rows, the dense truth is {result['gap']} away: nothing is proven")
    return problems


def wrong_counts(result: dict[str, Any]) -> list[str]:
    """Counters that differ from the contract's own classes, row by row."""
    expected = {
        **result["expected"],
        "steps": result["steps"],
        "triangle_layer_rows": 2 * result["expected"].get("triangle", 0),
        "dynamic_layer_rows": result["expected"].get("dynamic_layer_rows", 0),
        "tracked_requests": len(result["told"]),
    }
    return [
        f"{name}: {result['counted'].get(name)}, expected {expected.get(name)}"
        for name in sorted({*result["counted"], *expected} - {"keys_read", "keys_causal"})
        if result["counted"].get(name) != expected.get(name)
    ]


def wrong_density(result: dict[str, Any]) -> list[str]:
    """Whether the keys counted are fewer than dense, where dynamic patterns computed rows, and none elsewhere."""
    read, causal = result["counted"]["keys_read"], result["counted"]["keys_causal"]
    rows = result["counted"]["dynamic_layer_rows"]
    return (
        [] if (0 < read <= causal if rows else read == causal == 0) else [f"{rows} rows read {read} of {causal} keys"]
    )


def wrong_tracking(result: dict[str, Any]) -> list[str]:
    """Requests that the wrapper knows and the scheduler doesn't, or with another prompt length than the runner's."""
    problems = []
    if result["tracked"] != result["told"]:
        problems.append(f"tracked {result['tracked']}, alive {result['told']}")
    for name, prompt_len in result["runner_prompt_lens"].items():
        if result["prompt_lens"].get(name) != prompt_len:
            problems.append(f"{name}: prompt of {result['prompt_lens'].get(name)}, the runner's is {prompt_len}")
    return problems


def wrong_notes(result: dict[str, Any]) -> list[str]:
    """What else the scenario found false."""
    return [name for name, holds in result["notes"].items() if not holds]


def problems(result: dict[str, Any]) -> list[str]:
    """Everything wrong with a scenario."""
    if crash(result):
        return [crash(result)]
    return [
        *wrong_rows(result),
        *wrong_counts(result),
        *wrong_density(result),
        *wrong_tracking(result),
        *wrong_notes(result),
    ]
