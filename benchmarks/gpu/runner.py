"""Runs stages, each in processes of its own, and goes on where an earlier run stopped."""

from __future__ import annotations

import argparse
import contextlib
import difflib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.gpu.processes import Terminated, terminable
from benchmarks.gpu.report import load, save
from benchmarks.gpu.summary import write_summary
from benchmarks.gpu.supervisor import TIME_RAN_OUT

ROOT = Path(__file__).parents[2]
STAGE_LIMIT = 480.0
_MOST_JOBS = 2
_POLL_SECONDS = 0.1
_STOP_SECONDS = 20.0
# What stages run. A change in any of it makes earlier results stale.
_SOURCES = ("vllm_trimix/**/*.py", "vllm_trimix/**/*.json", "benchmarks/**/*.py", "tests/*.py")
_SOURCES += ("tests/engine/*.py", "tests/kernels/*.py")


@dataclass(frozen=True)
class Stage:
    """One thing to find out, in at most ``STAGE_LIMIT`` seconds.

    Attributes:
        name: Names the result files.
        function: ``module:function``, called with a ``Report`` in the stage's process.
        seconds: What it takes on an H200; a run with a budget starts it only if that much is left.
        summary: What it finds out, in a line.
        settings: What it runs on a GPU; results count only for the same settings.
        toy: What a rehearsal changes of them.
        group: Stages of a group share a folder, and never run side by side.
    """

    name: str
    function: str
    seconds: float
    summary: str
    settings: dict[str, Any] = field(default_factory=dict)
    toy: dict[str, Any] = field(default_factory=dict)
    group: str | None = None


def main(stages: Sequence[Stage], probe: Callable[[bool], dict[str, Any]], argv: Sequence[str] | None = None) -> int:
    """The command line around a list of stages.

    Args:
        stages: In the order in which they run: the most valuable first.
        probe: Called with whether this is a rehearsal; returns the environment with ``device`` among it. Raises
            ValueError, with the fix, where nothing can run.
        argv: Arguments.

    Returns:
        The exit status: 0, 1 if a stage failed or ran out of time, 2 for bad input, 130 and 143 when interrupted.
    """
    args = _parser().parse_args(argv)
    try:
        chosen = _choose(stages, args.only)
        if args.list:
            for stage in chosen:
                print(f"{stage.name:<18}{stage.seconds:>5.0f} s  {stage.summary}")
            return 0
        environment = probe(args.toy)
    except ValueError as error:
        print(f"run_all.sh: error: {error}", file=sys.stderr)
        return 2
    output = args.output or ROOT / "build" / ("gpu-results-toy" if args.toy else "gpu-results")
    if args.dry_run:
        print(f"would run {', '.join(stage.name for stage in chosen)} on {environment['device']} into {output}")
        return 0
    output.mkdir(parents=True, exist_ok=True)
    run = _Run(output.resolve(), environment, args)
    try:
        with terminable():
            run.stages(chosen)
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    finally:
        run.stop()
        write_summary(output, stages, environment, left=run.left)
    if run.left:
        print(f"left: {', '.join(run.left)}: the budget is used up; the same command goes on with them")
    print(f"summary: {output / 'summary.md'}")
    return 1 if run.failed else 0


def source_digest(root: Path = ROOT) -> str:
    """Names the code that stages run: its files' names and contents, hashed."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in _SOURCES for path in root.glob(pattern)}):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


class _Run:
    """One call of the command line.

    Attributes:
        failed: Names of stages that failed or ran out of time.
        left: Names of stages that the budget left no time for.
    """

    def __init__(self, output: Path, environment: dict[str, Any], args: argparse.Namespace) -> None:
        self.failed: list[str] = []
        self.left: list[str] = []
        self._output, self._environment, self._toy, self._limit = output, environment, args.toy, args.stage_limit
        self._deadline = None if args.budget is None else time.monotonic() + args.budget
        self._source = source_digest()
        # Rehearsals on a CPU are mostly imports: one stage a core. What is timed has the machine to itself.
        cores = sorted(os.sched_getaffinity(0))[:_MOST_JOBS] if environment["device"] == "cpu" else [None]
        self._slots: list[int | None] = list(cores)
        self._running: list[_Running] = []

    def stages(self, stages: Sequence[Stage]) -> None:
        """Runs the stages, those that have passed before and those that don't fit in the budget excepted."""
        waiting = list(stages)
        while waiting or self._running:
            busy = {running.stage.group for running in self._running} - {None}
            stage = next((stage for stage in waiting if stage.group not in busy), None) if self._slots else None
            if stage is not None:
                waiting.remove(stage)
                self._start(stage)
                continue
            time.sleep(_POLL_SECONDS)
            for running in [running for running in self._running if running.supervisor.poll() is not None]:
                self._finish(running, running.supervisor.returncode)

    def stop(self) -> None:
        """Ends the stages that are running, because this run was interrupted."""
        for running in self._running:
            running.supervisor.terminate()
        for running in list(self._running):
            with contextlib.suppress(subprocess.TimeoutExpired):
                running.supervisor.wait(_STOP_SECONDS)
            self._finish(running, "interrupted")

    def _start(self, stage: Stage) -> None:
        path = self._output / f"{stage.name}.json"
        fresh, old = self._fresh(stage), load(path)
        same = old is not None and _identity(old) == _identity(fresh)
        if same and old is not None and old["status"] == "passed":
            print(f"{stage.name}: passed before, not run again", flush=True)
            return
        limit = self._limit
        if self._deadline is not None:
            rest = self._deadline - time.monotonic()
            if rest < (1 if self._toy else stage.seconds):
                self.left.append(stage.name)
                print(f"{stage.name}: left, it needs {stage.seconds:.0f} s of {max(0, rest):.0f} s", flush=True)
                return
            limit = min(limit, rest)
        if not same:
            # What another code or machine left there must not be continued.
            shutil.rmtree(path.with_suffix(""), ignore_errors=True)
        save(path, fresh)
        log = path.with_suffix(".log")
        log.unlink(missing_ok=True)
        print(f"{stage.name}: started", flush=True)
        core = self._slots.pop(0)
        env = dict(os.environ) if core is None else {**os.environ, "VLLM_CPU_OMP_THREADS_BIND": str(core)}
        command = [sys.executable, "-m", "benchmarks.gpu.supervisor", f"{limit}", str(log)]
        command += [sys.executable, "-m", "benchmarks.gpu.stage_process", str(path), stage.function]
        supervisor = subprocess.Popen(command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, start_new_session=True)
        self._running.append(_Running(stage, path, supervisor, core, limit, time.monotonic()))

    def _finish(self, running: _Running, status: int | str) -> None:
        self._running.remove(running)
        self._slots.append(running.core)
        result = load(running.path) or self._fresh(running.stage)
        result["seconds"] = round(time.monotonic() - running.started, 1)
        _conclude(result, status, limit=running.limit)
        save(running.path, result)
        if result["status"] in ("failed", "timeout"):
            self.failed.append(running.stage.name)
        print(f"{running.stage.name}: {result['status']} in {result['seconds']:.0f} s: {result['seen']}", flush=True)

    def _fresh(self, stage: Stage) -> dict[str, Any]:
        settings = {"toy": self._toy, "device": self._environment["device"], "group": stage.group, **stage.settings}
        return {
            "stage": stage.name,
            "status": "running",
            "seconds": 0.0,
            "seen": "",
            "environment": self._environment,
            "source": self._source,
            "settings": settings | (stage.toy if self._toy else {}),
            "checks": [],
        }


@dataclass(frozen=True)
class _Running:
    """A stage that is running, and what it occupies."""

    stage: Stage
    path: Path
    supervisor: subprocess.Popen[bytes]
    core: int | None
    limit: float
    started: float


def _conclude(result: dict[str, Any], status: int | str, *, limit: float) -> None:
    """Fills in the verdict: ``status`` is the supervisor's, or a word for what else ended the stage."""
    failed = [check for check in result["checks"] if not check["passed"]]
    passed = len(result["checks"]) - len(failed)
    if status == TIME_RAN_OUT:
        result["status"] = "timeout"
        result["seen"] = f"ended after {limit:.0f} s; {passed} checks had passed, {len(failed)} failed"
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


def _choose(stages: Sequence[Stage], only: str | None) -> list[Stage]:
    if only is None:
        return list(stages)
    known = {stage.name: stage for stage in stages}
    wanted = [name.strip() for name in only.split(",") if name.strip()]
    for name in wanted:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]!r}?" if near else f"stages: {', '.join(known)}"
            raise ValueError(f"--only: unknown stage {name!r}; {hint}")
    if not wanted:
        raise ValueError(f"--only: names no stage; stages: {', '.join(known)}")
    return [stage for stage in stages if stage.name in wanted]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run_all.sh",
        description="Everything that only an NVIDIA GPU can show, in stages. Stages that passed before, on this code "
        "and this machine, are not run again.",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="results; default: build/gpu-results[-toy]")
    # Read by run_all.sh, named here for --help.
    parser.add_argument("--archive", metavar="DIR", help="folder of a packed vLLM with its unpack.sh; default: .vp")
    parser.add_argument("--toy", action="store_true", help="rehearse every stage at toy size; needs no GPU")
    parser.add_argument("--only", metavar="STAGE,...", help="run these stages, in the usual order")
    parser.add_argument("--list", action="store_true", help="say which stages there are, and stop")
    parser.add_argument("--dry-run", action="store_true", help="prepare everything, say what would run, and stop")
    parser.add_argument("--budget", type=float, metavar="SECONDS", help="start no stage that would run past this")
    parser.add_argument(
        "--stage-limit", type=float, default=STAGE_LIMIT, metavar="SECONDS", help="default: %(default).0f a stage"
    )
    return parser
