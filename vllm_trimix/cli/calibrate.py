"""``vllm-trimix calibrate``: measures from which prompt length each pattern pays here, as a preset overlay."""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from vllm_trimix.calibration import asking, break_even, report
from vllm_trimix.calibration.overlay import (
    SERVER_KEYS,
    SOURCE,
    check_base,
    check_output,
    make_overlay,
    overlay_shallow,
    write_overlay,
)
from vllm_trimix.cli import arguments
from vllm_trimix.cli.output import serve_command, teller
from vllm_trimix.config.entry import Resolved, TrimixConfig, parse_config
from vllm_trimix.measurement.engine_process import EngineDied, EngineProcess

TAKES_ENGINE_FLAGS = True

_say = teller("calibrate")

_ENGINE = "vllm_trimix.backend.engines.calibration"
_START_LINE = r"TRIMIX: (layers=.*)"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure from which prompt length the triangle pays here, and write it as a preset overlay",
        usage="vllm-trimix calibrate MODEL [options] [-- ENGINE FLAGS]",
        description="Runs one engine on this machine and asks it random prompts of growing length, each once with the "
        "triangle and once dense. The break-even is the smallest measured length from which on the triangle is never "
        "slower: there the 95% interval of the paired ratio of times to first token ends at or below 1. It is "
        "written as min_prompt_len of a preset overlay. A dynamic pattern in the shallow layers is measured likewise, "
        "against the triangle alone, for its min_seq_len. Have the machine to yourself meanwhile.",
        epilog="After -- come engine flags of vllm serve, the ones you serve with: "
        "vllm-trimix calibrate MODEL -- --dtype bfloat16 --tensor-parallel-size 2",
    )
    arguments.add_model(parser, "HF id or path, as vllm serve takes it")
    arguments.add_trimix(parser, "the trimix entry, where no preset fits, e.g. '{\"starting_layer\": 16}'")
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="the overlay (default: trimix-<model name>.json)"
    )
    parser.add_argument(
        "--max-length",
        type=arguments.whole,
        metavar="TOKENS",
        help=f"longest prompt (default: {break_even.LONGEST}, or what the model can take)",
    )
    parser.add_argument(
        "--repeats",
        type=arguments.whole,
        default=break_even.DEFAULT_REPEATS,
        help="pairs of requests per length (default: %(default)s, with which the interval survives a disturbed pair)",
    )
    parser.add_argument(
        "--budget",
        type=_minutes,
        default=10.0,
        metavar="MINUTES",
        help="of the whole run; the longest prompts are dropped first (default: %(default)g)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measures and writes the overlay. Returns 1 if no break-even was found (nothing is written) or the engine died.

    Raises:
        ValueError: Something the user got wrong.
        OSError: The overlay can't be written.
    """
    start = time.monotonic()
    entry, output = check(args)
    arguments.check_packages("vllm")

    def left() -> float:
        return start + 60 * args.budget - time.monotonic()

    _say(f"starting the engine for {args.model}")
    job = {
        "model": args.model,
        "flags": args.flags,
        "trimix": entry.model_dump(exclude_unset=True),
        "max_length": args.max_length,
        "shortest": break_even.SHORTEST,
        "longest": break_even.LONGEST,
    }
    try:
        with EngineProcess(_ENGINE, job, left=left) as engine:
            try:
                ready = engine.wait_ready()
            except ValueError as error:
                # An error of a server start, where the entry has another place.
                where = "; calibrate takes that entry by --trimix" if "--additional-config" in str(error) else ""
                raise ValueError(f"{error}{where}") from None
            except TimeoutError:
                raise ValueError(
                    f"--budget: {args.budget:g} minutes were over before the engine was ready; allow more"
                ) from None
            if args.max_length is None and ready["longest"] < break_even.LONGEST:
                _say(
                    f"prompts of up to {ready['longest']} tokens: what the model takes and memory holds (--max-length)"
                )
            resolved = Resolved.model_validate(ready["ready"]["resolved"])
            if resolved.shallow is not None:
                overlay_shallow(entry, resolved, output)
            compared = asking.comparisons(resolved, ready["ready"].get("shallow_dense_len"))
            measured = asking.measure_all(
                engine, compared, resolved, longest=ready["longest"], repeats=args.repeats, left=left, say=_say
            )
            ran = engine.wait_for_log(_START_LINE, 0)
    except EngineDied as died:
        print(*died.last_lines, sep="\n", file=sys.stderr)
        print(f"vllm-trimix: error: {died}", file=sys.stderr)
        return 1
    warnings = [warning for rows in measured.values() for warning in report.cautions(rows)]
    found = {candidate: break_even.break_even(rows) for candidate, rows in measured.items()}
    # Without a length at which the triangle pays, nothing else makes a server worth it.
    needed = compared[0].candidate
    if needed != break_even.DYNAMIC and found.get(break_even.DYNAMIC, 0) is None:
        warnings.append(report.stays_dense(measured[break_even.DYNAMIC], resolved))
    for warning in warnings:
        _say(f"warning: {warning}")
    if found[needed] is None:
        print(report.no_break_even(measured[needed], needed, resolved))
        return 1
    for comparison in compared:
        length = found[comparison.candidate]
        if length is not None:
            print(report.verdict(comparison, resolved, length))
    provenance = {
        "source": SOURCE,
        "date": datetime.date.today().isoformat(),
        "model": args.model,
        "hardware": ready["ready"]["hardware"],
        "versions": ready["ready"]["versions"],
        "engine_args": args.flags,
        "engine": ready["ready"]["engine"],
        "ran": ran[1].strip() if ran else "",
        "measured": report.method(args.repeats),
        "warnings": warnings,
        "samples": [row.as_json() for row in measured.get(break_even.TRIANGLE, [])],
    }
    if break_even.DYNAMIC in measured:
        provenance["dynamic_samples"] = [row.as_json() for row in measured[break_even.DYNAMIC]]
    overlay = make_overlay(
        entry,
        resolved,
        min_prompt_len=found.get(break_even.TRIANGLE),
        min_seq_len=found.get(break_even.DYNAMIC),
        output=output,
        provenance=provenance,
    )
    write_overlay(overlay, output)
    print(f"wrote {output}; serve with:\n\n{_serve_line(args.model, args.flags, entry, output)}")
    return 0


def check(args: argparse.Namespace) -> tuple[TrimixConfig, Path]:
    """Everything that can be refused before an engine starts.

    Raises:
        ValueError: Naming the argument, its value and the fix.
        OSError: The overlay can't be written.
    """
    if args.repeats < break_even.MIN_REPEATS:
        raise ValueError(
            f"--repeats: {args.repeats} is too few; the least is {break_even.MIN_REPEATS}, and a 95% interval needs 6"
        )
    if args.max_length is not None:
        break_even.sweep_lengths(args.max_length)
    if any(flag in ("-h", "--help") or flag.startswith("--help=") for flag in args.flags):
        raise ValueError("engine flags (after --): for help on them run: vllm serve --help=all")
    if args.model.startswith("-"):
        raise ValueError(f"MODEL: {args.model!r} looks like a flag; name the model first, engine flags after --")
    looks_like_path = args.model.startswith((".", "/", "~")) or args.model.count("/") > 1
    if looks_like_path and "://" not in args.model and not Path(args.model).exists():
        raise ValueError(f"MODEL: {args.model!r} does not exist")
    entry = parse_config({} if args.trimix is None else arguments.read_json("--trimix", args.trimix))
    if entry.min_prompt_len is not None:
        raise ValueError(f"--trimix: min_prompt_len ({entry.min_prompt_len}) is what is measured; leave it out")
    if isinstance(entry.shallow, dict) and "min_seq_len" in entry.shallow:
        raise ValueError(
            f"--trimix: shallow.min_seq_len ({entry.shallow['min_seq_len']}) is what is measured; leave it out"
        )
    output = args.output or Path(f"trimix-{model_name(args.model)}.json")
    check_output(output)
    check_base(entry, output)
    return entry, output


def _serve_line(model: str, flags: Sequence[str], entry: TrimixConfig, output: Path) -> str:
    """The ``vllm serve`` command that uses the overlay, from any folder."""
    kept = {key: getattr(entry, key) for key in SERVER_KEYS if key in entry.model_fields_set}
    return serve_command(model, {"preset": str(output.resolve()), **kept}, flags=flags)


def model_name(model: str) -> str:
    """The last part of an HF id or path, fit for a file's name."""
    last = Path(model).resolve().name if Path(model).exists() else model.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return minutes
