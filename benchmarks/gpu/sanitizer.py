"""NVIDIA's compute-sanitizer on one case, in a box of seconds: whatever it says or refuses becomes a sentence."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.gpu.one_case import RIGHT

_NAME = "compute-sanitizer"
_TOOLKIT = Path("/usr/local/cuda/bin")
# Where NVIDIA's Python packages for CUDA 13 and 12 put it. Those for 13.0 to 13.3 and 12.9 lack its program
# TreeLauncherSubreaper, without which it starts nothing; 13.5 has it.
_PACKAGES = ("nvidia/cu13/compute-sanitizer", "nvidia/cu13/bin", "nvidia/cuda_sanitizer_api/bin")
# PyTorch's own kernels would cost most of the box.
_KERNELS = ("triangle_prefill_kernel", "merge_partials_kernel", "sparse_prefill_kernel", "estimate_kernel")
_REFUSALS = ("device not supported", "not supported on this", "not supported by platform", "insufficient driver")
_LINES = 12

Tool = Literal["memcheck", "racecheck"]
Outcome = Literal["clean", "errors", "refused", "time ran out", "missing", "proved nothing"]


@dataclass(frozen=True)
class Finding:
    """What came of one run.

    Attributes:
        case: Name of the case.
        tool: The tool.
        outcome: In a word or two.
        sentence: For a person.
        lines: The first that the tool printed of an error, or the last of all.
        seconds: It took.
    """

    case: str
    tool: Tool
    outcome: Outcome
    sentence: str
    lines: list[str]
    seconds: float


def find(folders: list[str] | None = None) -> str | None:
    """Its path: on PATH, in CUDA's toolkit, or in a Python package; None if it is nowhere.

    Args:
        folders: Of Python packages; None is ``sys.path``.
    """
    found = shutil.which(_NAME)
    if found is not None:
        return found
    places = [_TOOLKIT, *(Path(folder) / part for folder in folders or sys.path for part in _PACKAGES)]
    return next((str(place / _NAME) for place in places if os.access(place / _NAME, os.X_OK)), None)


class Run:
    """A run that has begun; ``finish`` waits for it."""

    def __init__(self, case: str, tool: Tool, box: float, *, device: str = "cuda") -> None:
        """Starts it, if it can be found.

        Args:
            case: Name of the case.
            tool: What to check.
            box: Seconds from now; then it is killed.
            device: Of the case; ``cpu`` rehearses.
        """
        self._case, self._tool, self._box = case, tool, box
        self._started = time.monotonic()
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self._process: subprocess.Popen[Any] | None = None
        program = find()
        if program is None:
            return
        filters = [part for kernel in _KERNELS for part in ("--kernel-name", f"kernel_substring={kernel}")]
        command = [program, "--tool", tool, "--target-processes", "application-only", "--print-limit", "5", *filters]
        command += [sys.executable, "-m", "benchmarks.gpu.one_case", case, "--device", device]
        # In blocks of its own each tensor ends where an access behind it is seen.
        env = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            env=env,
            cwd=Path(__file__).parents[2],
            start_new_session=True,
        )

    def finish(self) -> Finding:
        """Waits until it ends or its box is used up, and reads what it said."""
        if self._process is None:
            return self._finding("missing", f"{_NAME} is neither on PATH, in {_TOOLKIT}, nor in a Python package", [])
        status = None
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(max(0.0, self._box - (time.monotonic() - self._started)))
        if status is None:
            # The tool and the process under it.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.seek(0)
        return self._finding(*read(self._log.read(), self._case, box=self._box, ended=status is not None))

    def _finding(self, outcome: Outcome, sentence: str, lines: list[str]) -> Finding:
        self._log.close()
        seconds = round(time.monotonic() - self._started, 1)
        return Finding(self._case, self._tool, outcome, f"{self._tool} of {self._case}: {sentence}", lines, seconds)


def read(text: str, case: str, *, box: float, ended: bool) -> tuple[Outcome, str, list[str]]:
    """Outcome, sentence and the lines that matter of what the tool and the case printed.

    Args:
        text: All of it.
        case: Name of the case.
        box: Seconds that it had.
        ended: Whether it ended by itself.
    """
    said = [line for line in text.splitlines() if line.strip()]
    refusal = next((line for line in said if any(word in line.lower() for word in _REFUSALS)), None)
    if refusal is not None:
        return "refused", f"it refuses this device: {_plain(refusal)}", [refusal]
    if not ended:
        return "time ran out", f"it had not ended after {box:.0f} s", said[-_LINES:]
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", text)
    errors = int(summary[1]) if summary else 0
    if errors:
        first = next((index for index, line in enumerate(said) if _is_error(line)), 0)
        lines = said[first : first + _LINES]
        return "errors", f"{errors} errors, the first: {' '.join(map(_plain, lines[:3]))}", lines
    # Some versions print a clean summary without having run anything.
    if summary and f"case {case} {RIGHT}" in text:
        return "clean", "no error, and the answer is right", [summary[0]]
    if summary and f"case {case} " in text:
        return "clean", "no error, though the answer is wrong", [summary[0]]
    reason = next((line for line in said if "Error" in line), said[-1] if said else "it printed nothing")
    return "proved nothing", f"the case did not run to its end under it: {_plain(reason)}", said[-_LINES:]


def _is_error(line: str) -> bool:
    return re.match(r"=+ (Invalid|Error|Warning|Program hit|Out-of-range|Misaligned|.*hazard)", line) is not None


def _plain(line: str) -> str:
    return line.lstrip("= ").strip()
