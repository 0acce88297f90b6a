"""``vllm-trimix calibrate``: measures from which prompt length each pattern pays here, as a preset overlay."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import json
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from vllm_trimix.calibration import break_even, report
from vllm_trimix.calibration.break_even import Comparison, Row
from vllm_trimix.calibration.overlay import (
    SERVER_KEYS,
    SOURCE,
    check_base,
    check_output,
    make_overlay,
    overlay_shallow,
    write_overlay,
)
from vllm_trimix.cli.arguments import whole
from vllm_trimix.config.entry import Resolved, TrimixConfig, parse_config
from vllm_trimix.measurement.engine_process import EngineDied, EngineProcess

TAKES_ENGINE_FLAGS = True

_ENGINE = "vllm_trimix.backend.engines.calibration"
_START_LINE = r"TRIMIX: (layers=.*)"
_LOG_SECONDS = 10.0
# What the log says once rows of a variant were computed.
_RAN = {break_even.TRIANGLE: r"TRIMIX rows: triangle=[1-9]", break_even.DYNAMIC: r"dynamic_layer_rows=[1-9]"}
_KEYS = re.compile(r"TRIMIX rows: .* keys_read=(\d+) keys_causal=(\d+) ")
# Until what a row of the table ran is in the log.
_SETTLE_SECONDS = 1.2


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
    parser.add_argument("model", metavar="MODEL", help="HF id or path, as vllm serve takes it")
    parser.add_argument(
        "--trimix", metavar="JSON", help="the trimix entry, where no preset fits, e.g. '{\"starting_layer\": 16}'"
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE.json", help="the overlay (default: trimix-<model name>.json)"
    )
    parser.add_argument(
        "--max-length",
        type=whole,
        metavar="TOKENS",
        help=f"longest prompt (default: {break_even.LONGEST}, or what the model can take)",
    )
    parser.add_argument(
        "--repeats",
        type=whole,
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
            resolved = Resolved.model_validate(ready["ready"]["resolved"])
            if resolved.shallow is not None:
                overlay_shallow(entry, resolved, output)
            compared = comparisons(resolved, ready["ready"].get("shallow_dense_len"))
            measured = measure_all(
                engine, compared, resolved, longest=ready["longest"], repeats=args.repeats, left=left
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
    print(f"wrote {output}; serve with:\n\n{serve_command(args.model, args.flags, entry, output)}")
    return 0


def comparisons(resolved: Resolved, shallow_dense_len: int | None) -> list[Comparison]:
    """What is measured, in order: the triangle over dense, then the shallow layers' pattern over the triangle alone.

    Args:
        resolved: What runs.
        shallow_dense_len: Longest prompt of which the shallow pattern has no row, in tokens; None without a pattern.
    """
    found = []
    if resolved.layers:
        found.append(Comparison(break_even.DENSE, break_even.TRIANGLE, resolved.triangle.dense_len))
    if shallow_dense_len is not None:
        baseline = break_even.TRIANGLE if resolved.layers else break_even.DENSE
        found.append(Comparison(baseline, break_even.DYNAMIC, shallow_dense_len))
    return found


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
    try:
        raw = {} if args.trimix is None else json.loads(args.trimix)
    except ValueError as error:
        raise ValueError(f"--trimix: {args.trimix!r} is not JSON: {error}") from None
    entry = parse_config(raw)
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


def measure_all(
    engine: EngineProcess,
    compared: Sequence[Comparison],
    resolved: Resolved,
    *,
    longest: int,
    repeats: int,
    left: Callable[[], float],
) -> dict[str, list[Row]]:
    """The rows of each comparison, by its candidate; the time that is left is shared out evenly."""
    measured = {}
    for number, comparison in enumerate(compared, 1):
        reserved = left() * (1 - 1 / (len(compared) - number + 1))
        measured[comparison.candidate] = measure(
            engine,
            comparison,
            resolved,
            longest=longest,
            repeats=repeats,
            left=functools.partial(_before, left, reserved),
        )
    return measured


def measure(
    engine: EngineProcess,
    comparison: Comparison,
    resolved: Resolved,
    *,
    longest: int,
    repeats: int,
    left: Callable[[], float],
) -> list[Row]:
    """Measures all lengths and prints a line for each.

    Raises:
        ValueError: No row ran the pattern.
        EngineDied: The engine ended.
    """
    _say(report.announcement(comparison, resolved))
    print(report.header(comparison, repeats), flush=True)
    is_dynamic = comparison.candidate == break_even.DYNAMIC
    checked = False
    keys_before = _keys(engine.log)
    densities: dict[int, float | None] = {}

    def on_row(row: Row) -> None:
        nonlocal checked, keys_before
        if is_dynamic:
            # Written some time after the rows that it counts.
            time.sleep(_SETTLE_SECONDS)
            keys = _keys(engine.log)
            read, causal = (now - before for now, before in zip(keys, keys_before, strict=True))
            keys_before = keys
            densities[row.length] = read / causal if causal else None
            row = dataclasses.replace(row, density=densities[row.length])
        print(report.format_row(row), flush=True)
        if not row.is_control and not checked:
            if engine.wait_for_log(_RAN[comparison.candidate], _LOG_SECONDS) is None:
                raise ValueError(
                    f"no row of a prompt of {row.length} tokens ran {report.what(comparison.candidate, resolved)}; see "
                    "vllm-trimix doctor"
                )
            checked = True

    def ask(length: int, seed: int, variant: str) -> float:
        return float(
            engine.ask({"length": length, "seed": seed, "extra_args": break_even.VARIANTS[variant]})["seconds"]
        )

    rows = break_even.measure(ask, comparison, longest=longest, repeats=repeats, left=left, on_row=on_row, say=_say)
    return [dataclasses.replace(row, density=densities.get(row.length)) for row in rows]


def _keys(log: str) -> tuple[int, int]:
    """Keys that dynamic patterns read so far, and keys that they could have read."""
    found = [(int(read), int(causal)) for read, causal in _KEYS.findall(log)]
    return sum(read for read, _ in found), sum(causal for _, causal in found)


def _before(left: Callable[[], float], reserved: float) -> float:
    """Seconds left of the time before that which is kept for later."""
    return left() - reserved


def serve_command(model: str, flags: Sequence[str], entry: TrimixConfig, output: Path) -> str:
    """The ``vllm serve`` command that uses the overlay, from any folder."""
    kept = {key: getattr(entry, key) for key in SERVER_KEYS if key in entry.model_fields_set}
    backend = [] if "TRIMIX" in flags else ["--attention-backend", "TRIMIX"]
    additional = json.dumps({"trimix": {"preset": str(output.resolve()), **kept}})
    return shlex.join(["vllm", "serve", model, *backend, *flags, "--additional-config", additional])


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


def _say(text: str) -> None:
    """Progress; the table alone is the output."""
    print(f"calibrate: {text}", file=sys.stderr, flush=True)
