"""The command line of programs of stages."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import write_atomically
from benchmarks.gpu.running.bundle import restore
from benchmarks.gpu.running.processes import Terminated, terminable
from benchmarks.gpu.running.schedule import Options, Schedule
from benchmarks.gpu.running.source import ROOT
from benchmarks.gpu.running.summary import summary
from benchmarks.gpu.stage import STAGE_LIMIT, Program, Stage

_MOST_JOBS = {"cpu": 2, "cuda": 8}


def main(
    programs: Mapping[str, Program], probe: Callable[[bool], dict[str, Any]], argv: Sequence[str] | None = None
) -> int:
    """The command line around programs of stages.

    Args:
        programs: By name; the first is what runs by default.
        probe: Called with whether this is a rehearsal; returns the environment with ``device`` among it. Raises
            ValueError, with the fix, where nothing can run.
        argv: Arguments.

    Returns:
        The exit status: 0, 1 if a stage failed or ran out of time, 2 for bad input, 130 and 143 when interrupted.
    """
    started = time.monotonic()
    # Set by the scripts: which of them it is.
    which = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    which.add_argument("--run", choices=list(programs), default=next(iter(programs)))
    known, rest = which.parse_known_args(argv)
    name, program = known.run, programs[known.run]
    args = _parser(program).parse_args(rest)
    try:
        chosen = _choose(program.stages, args.only)
        if args.list:
            for stage in chosen:
                print(f"{stage.name:<18}{stage.seconds:>5.0f} s  {stage.summary}")
            return 0
        environment = probe(args.toy)
        output = (args.output or _default_output(name, args.toy)).resolve()
        if args.dry_run:
            print(f"would run {', '.join(stage.name for stage in chosen)} on {environment['device']} into {output}")
            return 0
        if args.jobs is not None and args.jobs < 1:
            raise ValueError(f"--jobs: {args.jobs} is below 1, one stage at a time")
        if args.budget is not None and args.budget <= 0:
            raise ValueError(f"--budget: {args.budget:g} s is no time; give more than 0, or leave it out")
        for folder in (output, args.bundle):
            if folder is not None:
                folder.mkdir(parents=True, exist_ok=True)
        if args.resume is not None:
            restore(args.resume, output)
    except (ValueError, OSError) as error:
        print(f"{program.script}: error: {error}", file=sys.stderr)
        return 2
    budget = args.budget if args.budget is not None else None if args.toy else program.budget
    options = Options(
        output=output,
        bundle=args.bundle,
        toy=args.toy,
        limit=args.stage_limit,
        deadline=None if budget is None else started - args.elapsed + budget,
        jobs=args.jobs or _default_jobs(environment["device"]),
    )
    schedule = Schedule(program.stages, environment, options)
    try:
        with terminable():
            schedule.run(chosen)
    except KeyboardInterrupt:
        return 130
    except Terminated:
        return 143
    finally:
        schedule.stop()
        table = summary(output, program.stages, environment, left=schedule.left)
        write_atomically(output / "summary.md", table)
        schedule.take_home()
    print(f"summary: {output / 'summary.md'}\n\n{table}", flush=True)
    if schedule.left:
        print(f"left: {', '.join(schedule.left)}: the budget is used up; the same command goes on with them")
    print(f"{time.monotonic() - started + args.elapsed:.0f} s in all", flush=True)
    return 1 if schedule.failed else 0


def _default_output(name: str, toy: bool) -> Path:
    return ROOT / "build" / f"gpu-results{'' if name == 'all' else f'-{name}'}{'-toy' if toy else ''}"


def _default_jobs(device: str) -> int:
    """Stages side by side: a core each in a rehearsal, two each beside a GPU."""
    cores = len(os.sched_getaffinity(0))
    return max(1, min(_MOST_JOBS[device], cores if device == "cpu" else cores // 2))


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


def _parser(program: Program) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program.script,
        description=f"What only an NVIDIA GPU can show, in stages: {program.summary}. Stages that passed before, on "
        "this code and this machine, are not run again.",
    )
    # Set by the scripts: the seconds that they took so far.
    parser.add_argument("--elapsed", type=float, default=0.0, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, metavar="DIR", help="results; default: build/gpu-results[-RUN][-toy]")
    parser.add_argument(
        "--bundle", type=Path, metavar="DIR", help="renew three files there after each stage: results, table, logs"
    )
    parser.add_argument("--resume", type=Path, metavar="FILE", help="a bundle's results.json: what passed is kept")
    # Read by run_all.sh, named here for --help.
    parser.add_argument(
        "--archive", metavar="DIR", help="packed vLLM with its unpack.sh; default: .vp, if there is none"
    )
    parser.add_argument("--toy", action="store_true", help="rehearse every stage at toy size; needs no GPU")
    parser.add_argument("--only", metavar="STAGE,...", help="run these stages, in the usual order")
    parser.add_argument("--list", action="store_true", help="say which stages there are, and stop")
    parser.add_argument("--dry-run", action="store_true", help="prepare everything, say what would run, and stop")
    parser.add_argument(
        "--budget", type=float, metavar="SECONDS", help="start no stage that would run past this, nor let one"
    )
    parser.add_argument("--jobs", type=int, metavar="N", help="stages side by side, where they may be")
    parser.add_argument(
        "--stage-limit", type=float, default=STAGE_LIMIT, metavar="SECONDS", help="default: %(default).0f a stage"
    )
    return parser
