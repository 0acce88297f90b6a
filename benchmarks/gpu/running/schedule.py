"""Which stage runs when: side by side, in turns, within a budget, and going on where an earlier run stopped."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import granted_file, load, save, waiting_file
from benchmarks.gpu.running.bundle import write_bundle
from benchmarks.gpu.running.source import ROOT, source_digest
from benchmarks.gpu.running.supervisor import TIME_RAN_OUT
from benchmarks.gpu.stage import Stage

_POLL_SECONDS = 0.1
_STOP_SECONDS = 20.0
# With less left of the budget a prepared stage is not let go on: it would measure next to nothing.
_LEAST_SECONDS = 3.0


@dataclass(frozen=True)
class Options:
    """How a run is carried out.

    Attributes:
        output: Folder of results; exists.
        bundle: Folder for what is taken home, renewed after each stage; None: none.
        toy: Whether it is a rehearsal.
        limit: Seconds of a stage without a limit of its own.
        deadline: ``time.monotonic()`` at which the budget is used up; None: never.
        jobs: Stages side by side.
    """

    output: Path
    bundle: Path | None
    toy: bool
    limit: float
    deadline: float | None
    jobs: int


@dataclass
class _Running:
    """A stage that is running, and what it occupies.

    Attributes:
        stage: The stage.
        path: Its result file.
        supervisor: The process that holds it.
        slot: Number of the slot that it occupies.
        limit: Seconds after which it is ended, from ``since`` on.
        started: When it started.
        since: When the phase that ``limit`` is for began.
        phase: ``beside``, ``alone``, or of a prepared stage ``preparing``, ``waiting``, ``granted``.
        waited: Seconds that it waited for the device.
        ran_out: Whether it was ended because its time was used up.
    """

    stage: Stage
    path: Path
    supervisor: subprocess.Popen[bytes]
    slot: int
    limit: float
    started: float
    since: float
    phase: str
    waited: float = 0.0
    ran_out: bool = False


class Schedule:
    """One run of stages.

    Attributes:
        failed: Names of stages that failed or ran out of time.
        left: Names of stages that the budget left no time for.
    """

    def __init__(self, stages: Sequence[Stage], environment: dict[str, Any], options: Options) -> None:
        self.failed: list[str] = []
        self.left: list[str] = []
        self._stages, self._environment, self._options = stages, environment, options
        self._source = source_digest()
        self._slots = list(range(options.jobs))
        self._cores = sorted(os.sched_getaffinity(0))
        self._waiting: list[Stage] = []
        self._running: list[_Running] = []

    def run(self, chosen: Sequence[Stage]) -> None:
        """Runs the stages, those that have passed before and those that don't fit in the budget excepted."""
        self._waiting = list(chosen)
        while self._waiting or self._running:
            if self._start_next() or self._grant_next():
                continue
            time.sleep(_POLL_SECONDS)
            self._look()

    def stop(self) -> None:
        """Ends the stages that are running, because this run was interrupted."""
        for running in self._running:
            running.supervisor.terminate()
        for running in list(self._running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.supervisor.wait(_STOP_SECONDS)
            self._finish(running, "interrupted")

    def _rest(self) -> float:
        """Seconds left of the budget."""
        return float("inf") if self._options.deadline is None else self._options.deadline - time.monotonic()

    def _reserved(self) -> float:
        """Seconds that are kept free for prepared stages."""
        if self._options.toy:
            return 0.0
        late = [stage for stage in self._waiting if stage.use == "prepared"]
        late += [running.stage for running in self._running if running.phase in ("preparing", "waiting")]
        return sum(stage.seconds for stage in late)

    def _limit(self, stage: Stage, *, preparing: bool = False) -> float:
        """Seconds that a stage may take; a rehearsal's machine is not the one that its own limits are for."""
        own = stage.prepare if preparing else stage.limit
        return self._options.limit if self._options.toy or own is None else own

    def _is_alone(self, stage: Stage) -> bool:
        """Rehearsals on a CPU are mostly imports: there such stages share the machine."""
        return stage.use == "alone" and not (self._options.toy and self._environment["device"] == "cpu")

    def _start_next(self) -> bool:
        """Starts the next stage that may start; returns whether there was one."""
        if not self._slots or any(running.phase in ("alone", "granted") for running in self._running):
            return False
        groups = {running.stage.group for running in self._running} - {None}
        stage = next((stage for stage in self._waiting if stage.group not in groups), None)
        if stage is None or (self._is_alone(stage) and self._running):
            return False
        self._waiting.remove(stage)
        self._start(stage)
        return True

    def _grant_next(self) -> bool:
        """Gives the device to the first prepared stage once all that run wait for it; returns whether it did."""
        if not self._running or any(running.phase != "waiting" for running in self._running):
            return False
        running = min(self._running, key=lambda running: self._stages.index(running.stage))
        now = time.monotonic()
        running.waited += now - running.since
        limit = min(self._limit(running.stage), self._rest())
        if limit < _LEAST_SECONDS:
            running.supervisor.terminate()
            running.supervisor.wait()
            self._running.remove(running)
            self._slots.append(running.slot)
            why = f"{max(0, limit):.0f} s are left for measuring"
            save(running.path, {**(load(running.path) or self._fresh(running.stage)), "status": "left", "seen": why})
            self._leave(running.stage, why)
            return True
        running.phase, running.since, running.limit = "granted", now, limit
        granted_file(running.path).write_text(f"{limit}")
        waiting_file(running.path).unlink()
        print(f"{running.stage.name}: has the device to itself", flush=True)
        return True

    def _look(self) -> None:
        """Notices stages that wait for the device, that have used up their time, and that have ended."""
        now = time.monotonic()
        for running in list(self._running):
            if running.supervisor.poll() is not None:
                self._finish(running, TIME_RAN_OUT if running.ran_out else running.supervisor.returncode)
            elif running.phase == "preparing" and waiting_file(running.path).exists():
                running.phase, running.since = "waiting", now
            elif running.phase in ("preparing", "granted") and now - running.since > running.limit:
                # Its supervisor knows no phases.
                running.ran_out = True
                running.supervisor.terminate()

    def _start(self, stage: Stage) -> None:
        path = self._options.output / f"{stage.name}.json"
        fresh, old = self._fresh(stage), load(path)
        same = old is not None and _identity(old) == _identity(fresh)
        if same and old is not None and old["status"] == "passed":
            print(f"{stage.name}: passed before, not run again", flush=True)
            return
        rest = self._rest() - self._reserved()
        if rest < (1 if self._options.toy else stage.seconds):
            self._leave(stage, f"it needs {stage.seconds:.0f} s of {max(0, rest):.0f} s")
            return
        if not same:
            # What another code or machine left there must not be continued.
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        for flag in (waiting_file(path), granted_file(path)):
            flag.unlink(missing_ok=True)
        save(path, fresh)
        log = path.with_suffix(".log")
        log.unlink(missing_ok=True)
        print(f"{stage.name}: started", flush=True)
        prepared = stage.use == "prepared"
        limit = min(self._limit(stage, preparing=prepared), rest)
        # A prepared stage may wait for hours in a run without a budget: its phases are timed here.
        seconds = "inf" if prepared else f"{limit}"
        command = [sys.executable, "-m", "benchmarks.gpu.running.supervisor", seconds, str(log)]
        command += [sys.executable, "-m", "benchmarks.gpu.running.stage_process", str(path), stage.function]
        slot = self._slots.pop(0)
        supervisor = subprocess.Popen(
            command, cwd=ROOT, env=self._env(stage, slot), stdin=subprocess.DEVNULL, start_new_session=True
        )
        phase = "preparing" if prepared else "alone" if self._is_alone(stage) else "beside"
        now = time.monotonic()
        self._running.append(_Running(stage, path, supervisor, slot, limit, now, now, phase))

    def _env(self, stage: Stage, slot: int) -> dict[str, str]:
        """A core each on a CPU; on a GPU's host a share of the cores where stages run side by side."""
        if self._environment["device"] == "cpu":
            return {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": str(self._cores[slot % len(self._cores)])}
        if stage.use == "alone":
            return dict(os.environ)
        threads = max(1, len(self._cores) // self._options.jobs)
        return {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads), **os.environ}

    def _leave(self, stage: Stage, why: str) -> None:
        self.left.append(stage.name)
        print(f"{stage.name}: left, {why}", flush=True)

    def _finish(self, running: _Running, status: int | str) -> None:
        self._running.remove(running)
        self._slots.append(running.slot)
        result = load(running.path) or self._fresh(running.stage)
        if running.phase == "waiting":
            running.waited += time.monotonic() - running.since
        result["seconds"] = round(time.monotonic() - running.started - running.waited, 1)
        result["waited_seconds"] = round(running.waited, 1)
        _conclude(result, status, limit=running.limit)
        save(running.path, result)
        if result["status"] in ("failed", "timeout"):
            self.failed.append(running.stage.name)
        print(f"{running.stage.name}: {result['status']} in {result['seconds']:.0f} s: {result['seen']}", flush=True)
        self.take_home()

    def take_home(self) -> None:
        """Renews the bundle; one that can't be written stops nothing, for the results are in the output folder."""
        if self._options.bundle is None:
            return
        try:
            write_bundle(self._options.bundle, self._options.output, self._stages, self._environment, left=self.left)
        except OSError as error:
            print(f"--bundle: {error}", file=sys.stderr, flush=True)

    def _fresh(self, stage: Stage) -> dict[str, Any]:
        toy, device = self._options.toy, self._environment["device"]
        settings = {"toy": toy, "device": device, "group": stage.group, **stage.settings}
        return {
            "stage": stage.name,
            "status": "running",
            "seconds": 0.0,
            "seen": "",
            "environment": self._environment,
            "source": self._source,
            "settings": settings | (stage.toy if toy else {}),
            "checks": [],
        }


def _conclude(result: dict[str, Any], status: int | str, *, limit: float) -> None:
    """Fills in the verdict: ``status`` is the supervisor's, or a word for what else ended the stage."""
    failed = [check for check in result["checks"] if not check["passed"]]
    passed = len(result["checks"]) - len(failed)
    if status == TIME_RAN_OUT:
        result["status"] = "timeout"
        result["seen"] = (
            f"ended after {limit:.0f} s; {passed} checks had passed, {len(failed)} failed. {result['seen']}".strip()
        )
    elif status != 0 or failed:
        result["status"] = "failed"
        ended = status if isinstance(status, str) else f"exit status {status}, see the log"
        result["seen"] = f"{failed[0]['name']}: {failed[0]['detail']}" if failed else ended
    elif result["status"] == "skipped":
        return
    elif not result["checks"]:
        result["status"], result["seen"] = "failed", "it checked nothing"
    else:
        result["status"] = "passed"
        result["seen"] = result["seen"] or f"{passed} checks passed"


def _identity(result: dict[str, Any]) -> tuple[object, ...]:
    """What must be equal for a result to count again."""
    environment = {key: value for key, value in result["environment"].items() if key not in ("date", "commit")}
    return result["settings"], result["source"], environment
