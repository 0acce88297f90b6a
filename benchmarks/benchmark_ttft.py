"""Time to first token and latency between tokens, TRIMIX against stock vLLM, served and asked by ``vllm bench serve``.

    python -m benchmarks.benchmark_ttft --output build/ttft            # 512 to 32K tokens
    python -m benchmarks.benchmark_ttft --output build/quick --quick   # about 8 minutes on two cores
    python -m benchmarks.benchmark_ttft --output build/rows --rows published --prompts kv-retrieval

All servers are up, one is awake at a time; each round asks every configuration, the next round in the reverse order.
Interrupted runs go on where they stopped when called again. Run it with the machine to itself.
"""

from __future__ import annotations

if not __package__:
    # Started by its file.
    import as_module

    as_module.run(__file__)

import argparse
import json
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.benchmark_breakdown import BreakdownError, run_breakdown
from benchmarks.breakdown.report import table as breakdown_table
from benchmarks.environment import environment
from benchmarks.models import add_model_arguments, check_lengths, prepare_model, read_config
from benchmarks.serving.configurations import (
    IDEAL,
    ROWS,
    Configuration,
    configurations,
    resolved_settings,
)
from benchmarks.serving.gate import check
from benchmarks.serving.measuring import measure
from benchmarks.serving.prompts import KV_RETRIEVAL, PUBLISHED_LENGTHS, RANDOM, check_kind
from benchmarks.serving.report import markdown, plot_ttft
from benchmarks.serving.rounds import Rounds, summarise
from benchmarks.serving.servers import ServerError, choose_port, serve
from vllm_trimix.config.entry import Resolved
from vllm_trimix.measurement.intervals import MIN_SAMPLES

_BREAKDOWN_LENGTHS = (8192, 16384)
_QUICK_BREAKDOWN_LENGTHS = (4096,)
_QUICK_LENGTHS = "2048,8192"
_LENGTHS = "512,1024,2048,4096,8192,16384,32768"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.benchmark_ttft",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the results")
    add_model_arguments(parser)
    published = f"{PUBLISHED_LENGTHS[0]} to {PUBLISHED_LENGTHS[-1]}"
    parser.add_argument("--lengths", help=f"prompt tokens (default: {_LENGTHS}; {published} for {KV_RETRIEVAL})")
    parser.add_argument(
        "--prompts",
        default=RANDOM,
        metavar="KIND",
        help="random: random tokens; kv-retrieval: the published speed test's pairs of UUIDs; document: documents in "
        "the demo language, for models of vllm-trimix make-demo-model; or a text's file: passages of it "
        "(default: %(default)s)",
    )
    parser.add_argument("--concurrency", default="1", help="requests at a time, e.g. 1,4 (default: %(default)s)")
    parser.add_argument(
        "--repeats",
        type=int,
        default=MIN_SAMPLES,
        help="rounds per length; fewer than the default %(default)s have no 95%% interval",
    )
    parser.add_argument(
        "--decode-tokens", type=int, default=32, help="tokens after the first, for the latency between them"
    )
    parser.add_argument("--trimix", default='{"starting_layer": 4}', metavar="JSON", help="the trimix entry")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="another configuration: a trimix entry, or null for stock; again for more",
    )
    parser.add_argument(
        "--rows",
        default="",
        metavar="NAME,...",
        help=f"rows of the published table beside stock and TRIMIX: published, or some of {', '.join(ROWS)}",
    )
    parser.add_argument(
        "--shallow",
        default="{}",
        metavar="JSON",
        help="keys of every row's shallow entry, e.g. '{\"min_seq_len\": 0}'",
    )
    parser.add_argument(
        "--gate-only", action="store_true", help="stop after the correctness gate; a later call goes on from there"
    )
    parser.add_argument("--no-ideal", action="store_true", help="leave the floor out (no captured saving)")
    parser.add_argument("--no-breakdown", action="store_true", help="leave out where the time goes")
    parser.add_argument("--quick", action="store_true", help=f"lengths {_QUICK_LENGTHS}, servers not compiled")
    parser.add_argument("--cpus", default="0", help="cores of each server's worker on CPU machines (default: 0)")
    parser.add_argument("--port", type=int, default=0, help="of the first server; the next ones follow (default: any)")
    parser.add_argument("--start-timeout", type=float, default=900, metavar="S", help="for a server to be healthy")
    parser.add_argument(
        "--serve-arg",
        action="append",
        metavar="ARG",
        help="vllm serve argument of every server, e.g. --serve-arg=--kv-cache-dtype=fp8; again for more "
        "(default: --dtype=bfloat16, and --load-format=dummy for shapes)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    # So that a plain kill stops the servers as Ctrl-C does.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        return run(args)
    except (ValueError, ServerError, OSError) as error:
        print(f"benchmark_ttft: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    except KeyboardInterrupt:
        return 130


def run(args: argparse.Namespace) -> int:
    """Measures what is not measured yet, and writes the results, also when it ends early."""
    check_kind(args.prompts)
    usual = ",".join(map(str, PUBLISHED_LENGTHS)) if args.prompts == KV_RETRIEVAL else _LENGTHS
    lengths = _integers("--lengths", args.lengths or (_QUICK_LENGTHS if args.quick else usual))
    loads = [(length, c) for c in _integers("--concurrency", args.concurrency) for length in lengths]
    if args.repeats < 1 or args.decode_tokens < 0:
        raise ValueError(f"--repeats: {args.repeats}, --decode-tokens: {args.decode_tokens}; the least are 1 and 0")
    compared = configurations(args.trimix, args.config, ideal=not args.no_ideal, rows=args.rows, shallow=args.shallow)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        model = prepare_model(args.model, args.shape, scratch)
        check_lengths(lengths, model, answer_tokens=1 + args.decode_tokens)
        resolved = {configuration.name: resolved_settings(configuration, model) for configuration in compared}
        arguments = args.serve_arg or ["--dtype=bfloat16", *([] if args.model else ["--load-format=dummy"])]
        for index in range(len(compared) if args.port else 0):
            choose_port(args.port + index)
        if args.quick and args.serve_arg is None:
            # Compiling five servers takes longer than all that they are asked.
            arguments.append("--enforce-eager")
        args.output.mkdir(parents=True, exist_ok=True)
        where = environment()
        settings = {
            "model": str(args.model or args.shape),
            "configurations": {c.name: {"trimix": c.trimix, "arguments": list(c.arguments)} for c in compared},
            "serve_arguments": arguments,
            "cpus": args.cpus,
            "decode_tokens": args.decode_tokens,
            "prompts": args.prompts,
        }
        rounds = Rounds(args.output, {**settings, **{key: where[key] for key in ("commit", "cpu", "gpu", "versions")}})
        options = {"cpus": args.cpus, "arguments": arguments, "start_timeout": args.start_timeout}
        seen = _gate(
            args,
            resolved,
            configurations=compared,
            num_layers=read_config(model)["num_hidden_layers"],
            models=scratch,
            logs=args.output,
            longest=max(lengths),
            **options,
        )
        if args.gate_only:
            print("\n".join(f"correctness gate, {name}: {text}" for name, text in seen.items()))
            return 0
        todo = [load for load in loads if not all(rounds.has(*load, repeat) for repeat in range(args.repeats))]
        try:
            if todo:
                longest = max(length for length, _ in todo) + 1 + args.decode_tokens
                served = [c.counted() if _is_dynamic(resolved[c.name]) else c for c in compared]
                with serve(served, model, args.output, max_model_len=longest, port=args.port, **options) as servers:
                    measure(
                        servers,
                        model,
                        todo,
                        rounds,
                        repeats=args.repeats,
                        decode_tokens=args.decode_tokens,
                        prompts=args.prompts,
                        scratch=scratch,
                        dynamic={name for name, settings in resolved.items() if _is_dynamic(settings)},
                    )
        finally:
            if rounds.done:
                rows = summarise(rounds.done, resolved)
                result = {"environment": where, "settings": settings, "gate": seen, "rows": rows, "rounds": rounds.done}
                write(result, args.output)
        if not args.no_breakdown:
            breakdown(args, compared, model, longest=max(lengths), arguments=arguments)
    print((args.output / "report.md").read_text())
    return 0


def breakdown(
    args: argparse.Namespace, compared: list[Configuration], model: Path, *, longest: int, arguments: list[str]
) -> None:
    """Adds to the report where the time goes, from profiles of one process; a failure there costs no figure."""
    wanted = _QUICK_BREAKDOWN_LENGTHS if args.quick else _BREAKDOWN_LENGTHS
    lengths = sorted({min(longest, length) for length in wanted})
    # Its categories know no dynamic pattern.
    shown = {c.name: c.trimix for c in compared if c.name != IDEAL and "shallow" not in (c.trimix or {})}
    repeats = 1 if args.quick else 3
    try:
        rows = run_breakdown(
            model, lengths, shown, args.output, repeats=repeats, engine_args=tuple(arguments), cpus=args.cpus
        )
    except (BreakdownError, ValueError) as error:
        print(f"benchmark_ttft: no breakdown: {error}", file=sys.stderr)
        return
    with open(args.output / "report.md", "a") as file:
        file.write(f"\n## Where the time goes\n\n![time by category](breakdown.png)\n\n{breakdown_table(rows)}")


def _is_dynamic(settings: Resolved | None) -> bool:
    return settings is not None and settings.shallow is not None


def write(result: dict[str, Any], output: Path) -> None:
    """result.json, report.md and the plot."""
    (output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "report.md").write_text(markdown(result))
    plot_ttft(result, output / "ttft.png")


def _gate(args: argparse.Namespace, resolved: dict[str, Resolved | None], **options: Any) -> dict[str, str]:
    """Checks every configuration but the floor; what has passed is remembered in the output folder."""
    file = args.output / "gate.json"
    seen: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
    for configuration in options.pop("configurations"):
        name = configuration.name
        if name not in seen and name != IDEAL:
            print(f"correctness gate: {name}", file=sys.stderr, flush=True)
            seen[name] = check(configuration, resolved[name], **options)
            file.write_text(json.dumps(seen, indent=1) + "\n")
    return seen


def _integers(flag: str, text: str) -> list[int]:
    try:
        found = list(dict.fromkeys(int(item) for item in text.split(",")))
    except ValueError:
        raise ValueError(f"{flag}: {text!r} is not a list of numbers; write e.g. 512,1024") from None
    if min(found) < 1:
        raise ValueError(f"{flag}: {min(found)} is too small; the least is 1")
    return found


if __name__ == "__main__":
    sys.exit(main())
