"""``vllm-trimix calibrate``: measures from which prompt length the triangle pays here, as a preset overlay."""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_trimix import calibration
from vllm_trimix.calibration import Row
from vllm_trimix.config import Resolved, TrimixConfig, parse_config
from vllm_trimix.engine_process import EngineDied, EngineProcess
from vllm_trimix.intervals import CONFIDENCE, interval_confidence
from vllm_trimix.layers import format_layers

TAKES_ENGINE_FLAGS = True

_START_LINE = r"TRIMIX: (layers=.*)"
_LOG_SECONDS = 10.0
_TRIANGLE_ROWS = r"TRIMIX rows: triangle=[1-9]"


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "calibrate",
        help="measure from which prompt length the triangle pays here, and write it as a preset overlay",
        usage="vllm-trimix calibrate MODEL [options] [-- ENGINE FLAGS]",
        description="Runs one engine on this machine and asks it random prompts of growing length, each once with the "
        "triangle and once dense. The break-even is the smallest measured length from which on the triangle is never "
        "slower: there the 95% interval of the paired ratio of times to first token ends at or below 1. It is "
        "written as min_prompt_len of a preset overlay. Have the machine to yourself meanwhile.",
        epilog="After -- come engine flags of vllm serve, the ones you serve with: "
        "vllm-trimix calibrate MODEL -- --dtype bfloat16 --tensor-parallel-size 2",
    )
    parser.add_argument("model", metavar="MODEL", help="HF id or path, as vllm serve takes it")
    parser.add_argument(
        "--trimix", metavar="JSON", help="the trimix entry, where no preset fits, e.g. '{\"starting_layer\": 16}'"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="the overlay (default: trimix-<model name>.json)"
    )
    parser.add_argument(
        "--max-length",
        type=_whole,
        metavar="TOKENS",
        help=f"longest prompt (default: {calibration.LONGEST}, or what the model can take)",
    )
    parser.add_argument(
        "--repeats",
        type=_whole,
        default=calibration.DEFAULT_REPEATS,
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

    def left() -> float:
        return start + 60 * args.budget - time.monotonic()

    _say(f"starting the engine for {args.model}")
    job = {
        "model": args.model,
        "flags": args.flags,
        "trimix": entry.model_dump(exclude_unset=True),
        "max_length": args.max_length,
    }
    try:
        with EngineProcess(job, left=left) as engine:
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
            resolved = Resolved.model_validate(ready["ready"]["resolved"])
            rows = measure(engine, resolved, longest=ready["longest"], repeats=args.repeats, left=left)
            ran = engine.wait_for_log(_START_LINE, 0)
    except EngineDied as died:
        print(*died.last_lines, sep="\n", file=sys.stderr)
        print(f"vllm-trimix: error: {died}", file=sys.stderr)
        return 1
    warnings = cautions(rows)
    for warning in warnings:
        _say(f"warning: {warning}")
    found = calibration.break_even(rows)
    if found is None:
        print(no_break_even(rows))
        return 1
    print(f"break-even: {found} tokens. From there on the triangle was not slower than dense at any measured length.")
    provenance = {
        "source": calibration.SOURCE,
        "date": datetime.date.today().isoformat(),
        "model": args.model,
        "hardware": ready["ready"]["hardware"],
        "versions": ready["ready"]["versions"],
        "engine_args": args.flags,
        "engine": ready["ready"]["engine"],
        "ran": ran[1].strip() if ran else "",
        "measured": f"time to first token of single requests without prefix caching, triangle and opted-out dense in "
        f"turn on one engine, {args.repeats} pairs per length after a warm-up; the smallest measured length from "
        "which on the order-statistic interval of the median paired ratio ends at or below 1",
        "warnings": warnings,
        "samples": [row.as_json() for row in rows],
    }
    overlay = calibration.make_overlay(entry, resolved, min_prompt_len=found, output=output, provenance=provenance)
    calibration.write_overlay(overlay, output)
    print(f"wrote {output}; serve with:\n\n{serve_command(args.model, args.flags, entry, output)}")
    return 0


def check(args: argparse.Namespace) -> tuple[TrimixConfig, Path]:
    """Everything that can be refused before an engine starts.

    Raises:
        ValueError: Naming the argument, its value and the fix.
        OSError: The overlay can't be written.
    """
    if args.repeats < calibration.MIN_REPEATS:
        raise ValueError(
            f"--repeats: {args.repeats} is too few; the least is {calibration.MIN_REPEATS}, and a 95% interval needs 6"
        )
    if args.max_length is not None:
        calibration.sweep_lengths(args.max_length)
    if any(flag in ("-h", "--help") or flag.startswith("--help=") for flag in args.flags):
        raise ValueError("engine flags (after --): for help on them run: vllm serve --help=all")
    if args.model.startswith("-"):
        raise ValueError(f"MODEL: {args.model!r} looks like a flag; name the model first, engine flags after --")
    looks_like_path = args.model.startswith((".", "/", "~")) or args.model.count("/") > 1
    if looks_like_path and "://" not in args.model and not Path(args.model).exists():
        raise ValueError(f"MODEL: {args.model!r} does not exist")
    try:
        raw = {} if args.trimix is None else json.loads(args.trimix)
    except ValueError as error:
        raise ValueError(f"--trimix: {args.trimix!r} is not JSON: {error}") from None
    entry = parse_config(raw)
    if entry.min_prompt_len is not None:
        raise ValueError(f"--trimix: min_prompt_len ({entry.min_prompt_len}) is what is measured; leave it out")
    output = args.output or Path(f"trimix-{model_name(args.model)}.json")
    calibration.check_output(output)
    calibration.check_base(entry, output)
    return entry, output


def measure(
    engine: EngineProcess, resolved: Resolved, *, longest: int, repeats: int, left: Callable[[], float]
) -> list[Row]:
    """Measures all lengths and prints a line for each.

    Raises:
        ValueError: No row ran the triangle.
        EngineDied: The engine ended.
    """
    _say(
        f"layers {format_layers(resolved.layers)} of {resolved.num_layers} run the triangle (n_init {resolved.n_init}, "
        f"n_local {resolved.n_local}, last_n {resolved.last_n}), from {resolved.source}"
    )
    confidence = interval_confidence(repeats)
    level = f"{min(confidence, CONFIDENCE):.0%} interval"
    print(f"{'tokens':>7}{'dense (s)':>12}{'triangle (s)':>14}{'ratio':>8}{level:>16}  verdict", flush=True)
    checked = False

    def on_row(row: Row) -> None:
        nonlocal checked
        print(format_row(row), flush=True)
        if not row.is_control and not checked:
            # Written some time after the rows that it counts.
            if engine.wait_for_log(_TRIANGLE_ROWS, _LOG_SECONDS) is None:
                raise ValueError(f"no row of a prompt of {row.length} tokens ran the triangle; see vllm-trimix doctor")
            checked = True

    return calibration.measure(
        engine.ask,
        longest=longest,
        dense_len=resolved.triangle.dense_len,
        repeats=repeats,
        left=left,
        on_row=on_row,
        say=_say,
    )


def format_row(row: Row) -> str:
    """One line of the table."""
    low, high = row.interval
    seconds = [statistics.median(values) for values in (row.dense, row.triangle)]
    interval = f"{low:.3f}-{high:.3f}"
    return f"{row.length:>7}{seconds[0]:>12.4f}{seconds[1]:>14.4f}{row.ratio:>8.3f}{interval:>16}  {row.verdict}"


def cautions(rows: Sequence[Row]) -> list[str]:
    """What makes the result doubtful, in sentences."""
    found = []
    noisy = [row for row in rows if row.spread > calibration.LARGE_SPREAD]
    if noisy:
        worst = max(noisy, key=lambda row: row.spread)
        found.append(
            f"the machine was not quiet: dense times of one length differ by up to {worst.spread:.0%} "
            f"({worst.length} tokens); stop what else runs and measure again"
        )
    for shorter, longer in itertools.pairwise(rows):
        if statistics.median(longer.dense) < statistics.median(shorter.dense):
            found.append(
                f"the machine's speed changed: {longer.length} tokens took less time than {shorter.length}; "
                "stop what else runs and measure again"
            )
            break
    controls = [row for row in rows if row.is_control and not row.interval[0] <= 1 <= row.interval[1]]
    if controls:
        found.append(
            f"at {controls[0].length} tokens both variants ran the same code, yet their ratio was "
            f"{controls[0].ratio:.3f}: the timings are biased by about that much"
        )
    if rows and rows[0].confidence < CONFIDENCE:
        found.append(
            f"{len(rows[0].dense)} repeats give an interval of {rows[0].confidence:.0%} only; 95% needs 6 or more"
        )
    return found


def no_break_even(rows: Sequence[Row]) -> str:
    """Why nothing was written."""
    real = [row for row in rows if not row.is_control]
    if not real:
        return (
            "no break-even: --budget was over before a prompt was measured that the pattern shortens. Nothing written."
        )
    return (
        f"no break-even up to {real[-1].length} tokens: the triangle is not proven to be as fast as dense there. "
        "Nothing written. Allow longer prompts (--max-length, --budget), or serve without TRIMIX."
    )


def serve_command(model: str, flags: Sequence[str], entry: TrimixConfig, output: Path) -> str:
    """The ``vllm serve`` command that uses the overlay, from any folder."""
    kept = {key: getattr(entry, key) for key in calibration.SERVER_KEYS if key in entry.model_fields_set}
    backend = [] if "TRIMIX" in flags else ["--attention-backend", "TRIMIX"]
    additional = json.dumps({"trimix": {"preset": str(output.resolve()), **kept}})
    return shlex.join(["vllm", "serve", model, *backend, *flags, "--additional-config", additional])


def model_name(model: str) -> str:
    """The last part of an HF id or path, fit for a file's name."""
    last = Path(model).resolve().name if Path(model).exists() else model.rstrip("/").rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", last).strip("-.") or "model"


def _whole(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def _minutes(text: str) -> float:
    try:
        minutes = float(text)
    except ValueError:
        minutes = 0.0
    if not 0 < minutes < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of minutes above 0")
    return minutes


def _say(text: str) -> None:
    """Progress; the table alone is the output."""
    print(f"calibrate: {text}", file=sys.stderr, flush=True)
