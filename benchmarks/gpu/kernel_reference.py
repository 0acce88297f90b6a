"""The Triton kernels on the device against their definitions: the cases of the interpreter tests, and larger ones."""

from __future__ import annotations

import os
import time
import traceback
from dataclasses import asdict
from typing import Any

from benchmarks.gpu import sanitizer
from benchmarks.gpu.case_steps import attempt
from benchmarks.gpu.case_triage import smallest, triage_cases
from benchmarks.gpu.crew import Crew, Ended, Task
from benchmarks.gpu.kernel_cases import MUST_RUN, SMALLEST, all_cases, choose, first_cases, kernel_of, pairs
from benchmarks.gpu.report import Report
from benchmarks.gpu.variants import device_is_sound, interpreter_is_sound, use_device
from tests.kernels.interpreter import use_interpreter

__all__ = ["kernel_reference", "pairs"]

_WORKERS = 8
# A case compiles up to three kernels, with seven more compilers beside it.
_CASE_LIMIT = 60.0
# What runs when the box is used up may end.
_GRACE = 10.0
# Results are written so often that a killed stage keeps what it had.
_SAVE_SECONDS = 1.0


def kernel_reference(report: Report) -> None:
    """Runs the cases in order; one check for all, and one for each that fails.

    Settings:
        cases: ``ranked`` for all by value; names; None for those of the interpreter's tests.
        box: Seconds after which no case begins; what is left then is said, and no failure. None is no limit.
        triage: Seconds for the steps that tell why cases fail; 0 is none.
        sanitize: Seconds for compute-sanitizer, beside the triage; 0 is not at all.
    """
    cases = choose(report.settings["cases"])
    workers = min(_WORKERS, os.cpu_count() or 1) if report.cuda else 1
    results = _Results(report, cases)
    huge = {name: case for name, case in cases.items() if case.huge}
    ordinary = {name: case for name, case in cases.items() if not case.huge}
    box = report.settings.get("box")
    until = None if box is None else time.monotonic() + box
    with _crew(report, workers) as crew:
        _run(report, crew, ordinary, until, results)
        if not huge:
            _after(report, crew, cases, results)
    if huge:
        # Tensors with a stride of 2**30 elements fill the device's memory: one at a time, and nothing else beside it.
        with _crew(report, 1) as crew:
            _run(report, crew, huge, until, results)
            _after(report, crew, cases, results)
    results.conclude()


def _crew(report: Report, workers: int) -> Crew:
    if report.cuda:
        return Crew(workers, prepare=use_device, sound=device_is_sound)
    return Crew(workers, prepare=use_interpreter, sound=interpreter_is_sound)


def _run(report: Report, crew: Crew, cases: dict[str, Any], until: float | None, results: _Results) -> None:
    tasks = [Task(name, attempt, (case, report.device)) for name, case in cases.items()]
    # Interpreted kernels take what they take.
    limit = _CASE_LIMIT if report.cuda else 600.0
    crew.wait()
    with report.on_device():
        for ended in crew.run(tasks, limit=limit, start_until=until, end_by=None if until is None else until + _GRACE):
            results.add(ended)


def _after(report: Report, crew: Crew, cases: dict[str, Any], results: _Results) -> None:
    """Triage of the smallest failures, and compute-sanitizer beside it, or on one small case of each kernel.

    What goes wrong in here says nothing of the kernels: it is written down, and the stage's verdict stays.
    """
    followed = smallest({name: cases[name] for name in results.failed})
    runs = _sanitize(report, followed[:1] or list(SMALLEST), {**all_cases(), **cases})
    try:
        if followed and report.settings.get("triage"):
            chosen, box = {name: cases[name] for name in followed}, report.settings["triage"]
            found = triage_cases(crew, report.device, chosen, results.failed, box=box)
            report.figure(triage=found)
            for each in found:
                print(f"triage: {each['line']}", flush=True)
            results.notes.append(found[0]["line"])
    except Exception as error:
        traceback.print_exc()
        report.figure(triage_error=f"{type(error).__name__}: {error}")
    findings = [run.finish() for run in runs]
    if findings:
        report.figure(sanitizer=[asdict(finding) for finding in findings])
    for finding in findings:
        print(f"compute-sanitizer: {finding.sentence}", flush=True)
        if finding.outcome == "errors":
            results.notes.append(finding.sentence)


def _sanitize(report: Report, names: list[str], cases: dict[str, Any]) -> list[sanitizer.Run]:
    """Starts compute-sanitizer, once for each case and tool."""
    box = report.settings.get("sanitize")
    if not box:
        return []
    tools: list[tuple[str, sanitizer.Tool]] = [(name, "memcheck") for name in names]
    # The estimate's diagonal sums go through shared memory.
    tools += [(name, "racecheck") for name in names if kernel_of(cases[name]) == "estimate"]
    return [sanitizer.Run(name, tool, box, device=report.device) for name, tool in tools]


class _Results:
    """What became of the cases, written down as they end.

    Attributes:
        failed: Errors by name.
        notes: For the summary's line.
    """

    def __init__(self, report: Report, cases: dict[str, Any]) -> None:
        self.failed: dict[str, str] = {}
        self.notes: list[str] = []
        self._report, self._cases = report, cases
        self._passed: list[str] = []
        self._skipped: list[str] = []
        self._left: list[str] = []
        self._entries: dict[str, dict[str, Any]] = {}
        self._variants: dict[str, dict[str, Any]] = {}
        self._written = time.monotonic()

    def add(self, ended: Ended) -> None:
        """A case ended, or was never begun."""
        name = ended.task.name
        if ended.how in ("left", "cut"):
            self._left.append(name)
            return
        if ended.error.startswith("OutOfMemoryError"):
            self._skipped.append(name)
            self._say(name, "skipped", ended)
            return
        entry: dict[str, Any] = (
            dict(ended.value) if ended.how == "returned" else {"error": ended.error, "trace": ended.trace}
        )
        # Many cases share a compiled kernel.
        self._variants |= {facts["hash"]: facts for facts in entry.get("variants", [])}
        entry["variants"] = [facts["hash"] for facts in entry.get("variants", [])]
        self._entries[name] = entry
        if entry["error"]:
            self.failed[name] = entry["error"]
            self._report.check(name, False, _one_line(entry["error"]))
        else:
            self._passed.append(name)
            self._say(name, f"ok, {entry['of_budget']:.2f} of the budget", ended)
        if time.monotonic() - self._written > _SAVE_SECONDS:
            self._figures()

    def conclude(self) -> None:
        """One check for all, and the summary's line."""
        self._figures()
        report, ran = self._report, len(self._passed) + len(self.failed)
        where = "on the device" if report.cuda else "in the interpreter"
        of = f"{len(self._passed)} of {len(self._cases)} cases {where} within the error budget"
        rest = f"{len(self._skipped)} did not fit, {len(self._left)} were left for lack of time"
        report.check("cases", not self.failed and self._passed, f"{of}; {rest}")
        if report.settings["cases"] == "ranked":
            missing = [name for name in list(first_cases())[:MUST_RUN] if name not in self._entries]
            report.check("first cases", not missing, f"the first {MUST_RUN} ran" if not missing else _missing(missing))
        report.seen("; ".join([f"{of}, {len(self.failed)} of {ran} that ran failed; {rest}", *self.notes]))

    def _say(self, name: str, text: str, ended: Ended) -> None:
        print(f"{name}: {text}, {ended.seconds:.1f} s", flush=True)

    def _figures(self) -> None:
        self._written = time.monotonic()
        seconds = [entry["seconds"] for entry in self._entries.values() if "seconds" in entry]
        self._report.figure(
            cases=len(self._cases),
            cases_passed=len(self._passed),
            cases_skipped=self._skipped,
            cases_left=self._left,
            case_results=self._entries,
            variants=self._variants,
            # Of all workers together.
            case_seconds={
                what: round(sum(each.get(what, 0.0) for each in seconds), 2)
                for what in ("build", "compile", "first", "run", "check")
            },
        )


def _missing(names: list[str]) -> str:
    return f"{len(names)} of the first {MUST_RUN} did not run: {', '.join(names[:5])}"


def _one_line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines()[:3])[:500]
