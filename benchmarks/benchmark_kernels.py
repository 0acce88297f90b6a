"""One layer's prefill, kernel against kernel: the triangle against dense, ours against others, on a real paged cache.

    python -m benchmarks.benchmark_kernels --output benchmarks/results/NAME

Writes kernels.json, kernels.md and kernels.png. Each length is a whole prompt, prefilled in the steps that vLLM would
schedule. Every time has its samples, its share of the roofline and its error against fp64 beside it; a kernel whose
error is above its budget gets no time. Run it with the machine to itself.
"""

from __future__ import annotations

if not __package__:
    # Started by its file.
    import as_module

    as_module.run(__file__)

import argparse
import contextlib
import dataclasses
import json
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from benchmarks.environment import environment
from benchmarks.kernels import report
from benchmarks.kernels.ceilings import Ceilings
from benchmarks.kernels.contenders import CONTENDERS, Contender, dense_baseline, select
from benchmarks.kernels.counting import count_work, dense_pattern, roofline_fraction
from benchmarks.kernels.problem import DTYPES, Settings, check, default_chunk, make_problem
from benchmarks.kernels.timing import Result, measure, one_line
from vllm_trimix.measurement.intervals import median_interval
from vllm_trimix.patterns.triangle import Triangle

# (query heads, KV heads, head size, page, lengths, lengths of --quick): on CPU the bench model's layer and vLLM's
# default page, on CUDA Llama-3.1-8B's layer.
_DEFAULTS = {
    "cpu": (8, 2, 64, 128, "4096,8192,16384,32768", "2048,4096,8192"),
    "cuda": (32, 8, 128, 16, "8192,16384,32768,65536,131072", "8192,32768"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="DIR", help="folder for kernels.json, kernels.md, kernels.png")
    add("--quick", action="store_true", help="short prompts, 3 repeats, no kernel that compiles for each length on CPU")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="auto: CUDA where there is one")
    add("--lengths", help="prompt tokens, comma-separated; default: by device")
    add("--num-heads", type=int, help="query heads; default: 8 on CPU, 32 on CUDA")
    add("--num-kv-heads", type=int, help="KV heads; default: 2 on CPU, 8 on CUDA")
    add("--head-size", type=int, help="default: 64 on CPU, 128 on CUDA")
    add("--dtype", choices=sorted(DTYPES), default="bfloat16")
    add("--kv-cache-dtype", choices=["auto", "fp8"], default="auto", help="fp8: e4m3, scale 1, on CUDA")
    add("--block-size", type=int, help="tokens of a page; default: 128 on CPU, 16 on CUDA, as vLLM")
    add("--chunk", type=int, metavar="ROWS", help="rows of a step; default: max_num_batched_tokens of vLLM's server")
    add("--n-init", type=int, default=Triangle.n_init)
    add("--n-local", type=int, default=Triangle.n_local)
    add("--last-n", type=int, default=Triangle.last_n)
    add("--repeats", type=int, help="timed rounds; default: 7, with --quick 3")
    add("--contenders", help=f"comma-separated; default: all of {', '.join(CONTENDERS)}")
    add("--threads", type=int, default=1, help="CPU threads")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the benchmark; 0, or 2 with one line on stderr when the input is bad."""
    threads = torch.get_num_threads()
    try:
        args = _parser().parse_args(argv)
        settings, lengths, names = _read(args)
        args.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"benchmark_kernels: error: {error}", file=sys.stderr)
        return 2
    torch.set_num_threads(settings.threads)
    try:
        # Written after each length: a run that is cut off keeps what it has.
        for result in run(settings, lengths, names, quick=args.quick):
            (args.output / "kernels.json").write_text(json.dumps(result, indent=1) + "\n")
            (args.output / "kernels.md").write_text(report.markdown(result))
            report.figure(result, args.output / "kernels.png")
    finally:
        torch.set_num_threads(threads)
    print((args.output / "kernels.md").read_text())
    return 0


def _read(args: argparse.Namespace) -> tuple[Settings, list[int], list[str]]:
    """The run that the arguments ask for.

    Raises:
        ValueError: Naming the option, the value and the limit.
    """
    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device: torch sees no CUDA device here; use cpu")
    heads, kv_heads, head_size, block_size, lengths, quick_lengths = _DEFAULTS[device]
    try:
        wanted = [int(length) for length in (args.lengths or (quick_lengths if args.quick else lengths)).split(",")]
    except ValueError:
        raise ValueError(f"--lengths: {args.lengths!r} is not a comma-separated list of whole numbers") from None

    def given(value: int | None, default: int) -> int:
        return default if value is None else value

    settings = Settings(
        device=torch.device(device),
        dtype=DTYPES[args.dtype],
        fp8=args.kv_cache_dtype == "fp8",
        num_heads=given(args.num_heads, heads),
        num_kv_heads=given(args.num_kv_heads, kv_heads),
        head_size=given(args.head_size, head_size),
        block_size=given(args.block_size, block_size),
        chunk=default_chunk() if args.chunk is None else args.chunk,
        pattern=Triangle(args.n_init, args.n_local, args.last_n),
        threads=args.threads,
        repeats=given(args.repeats, 3 if args.quick else 7),
    )
    check(settings, wanted)
    names = list(CONTENDERS) if args.contenders is None else select(args.contenders.split(","))
    return settings, sorted(set(wanted)), names


def run(settings: Settings, lengths: list[int], names: list[str], *, quick: bool) -> Iterator[dict[str, Any]]:
    """Measures length by length; yields what kernels.json holds so far, after each and once more at the end."""
    # Naming contenders overrides what --quick leaves out.
    quick = quick and names == list(CONTENDERS)
    reasons = {name: CONTENDERS[name].unavailable(settings, quick=quick) for name in names}
    chosen = {name: CONTENDERS[name] for name, reason in reasons.items() if reason is None}
    baseline = dense_baseline(settings)
    env = environment()
    ceilings = Ceilings(settings.device, settings.dtype)
    ceilings.measure(settings)
    measured: dict[int, dict[str, Result]] = {}

    def result() -> dict[str, Any]:
        rows = [
            _row(settings, ceilings, name, chosen[name], length, found, results.get(baseline))
            for length, results in measured.items()
            for name, found in results.items()
        ]
        rows += [
            {**_about(name, CONTENDERS[name]), "length": None, "status": "unavailable", "reason": reason, "samples": []}
            for name, reason in reasons.items()
            if reason is not None
        ]
        return {
            "environment": env,
            "settings": {**_settings_json(settings), "lengths": list(measured), "dense_baseline": baseline},
            "ceilings": ceilings.as_json(),
            "rows": rows,
        }

    for length in lengths:
        measured[length] = _measure_length(settings, length, chosen)
        yield result()
    # A kernel that broke the device has said so in its row, and the first samples stand.
    with contextlib.suppress(RuntimeError):
        ceilings.measure(settings)
    yield result()


def _measure_length(settings: Settings, length: int, chosen: dict[str, Contender]) -> dict[str, Result]:
    try:
        problem = make_problem(settings, length)
    except RuntimeError as error:
        # Out of memory, or a device that an earlier kernel broke.
        return {name: Result("failed", f"no inputs: {one_line(error)}") for name in chosen}
    return measure(problem, chosen, repeats=settings.repeats)


def _settings_json(settings: Settings) -> dict[str, Any]:
    return {
        **{field.name: getattr(settings, field.name) for field in dataclasses.fields(settings)},
        "device": settings.device.type,
        "dtype": str(settings.dtype).removeprefix("torch."),
        "pattern": dataclasses.asdict(settings.pattern),
        "planning_in_time": settings.device.type == "cpu",
    }


def _about(name: str, contender: Contender) -> dict[str, Any]:
    return {
        "contender": name,
        "about": contender.about,
        "pattern": contender.pattern,
        "paged": contender.paged,
        "chunked": contender.chunked,
    }


def _row(
    settings: Settings,
    ceilings: Ceilings,
    name: str,
    contender: Contender,
    length: int,
    result: Result,
    baseline: Result | None,
) -> dict[str, Any]:
    """One contender at one length; no figure of time unless its output was right."""
    dense = dense_pattern(length)
    fp8 = settings.fp8 and contender.fp8_products
    width = settings.dtype.itemsize
    work = count_work(
        dense if contender.pattern == "dense" else settings.pattern,
        length,
        settings.chunks(length) if contender.chunked else [(0, length)],
        num_heads=settings.num_heads,
        num_kv_heads=settings.num_kv_heads,
        head_size=settings.head_size,
        q_bytes=1 if fp8 else width,
        kv_bytes=1 if settings.fp8 and contender.paged else width,
        out_bytes=width,
    )
    seconds = statistics.median(result.samples) if result.samples else None
    base = baseline.samples if baseline is not None and baseline.samples else None
    return {
        **_about(name, contender),
        "length": length,
        "status": result.status,
        "reason": result.reason,
        "seconds_median": seconds,
        "seconds_ci95": median_interval(result.samples) if result.samples else None,
        "samples": result.samples,
        "plan_seconds_median": statistics.median(result.plan_samples) if result.plan_samples else None,
        "plan_samples": result.plan_samples,
        "speedup_over_dense": statistics.median(base) / seconds if base and seconds else None,
        "speedup_ci95": (
            median_interval([a / b for a, b in zip(base, result.samples, strict=True)]) if base and seconds else None
        ),
        "pair_bound": dense.visible_pairs(length) / work.pairs,
        "pairs": work.pairs,
        "flops": work.flops,
        "bytes": work.bytes,
        "roofline_fraction": (
            roofline_fraction(
                work, seconds, flops_per_s=ceilings.flops_per_s(fp8=fp8), bytes_per_s=ceilings.bytes_per_s()
            )
            if seconds
            else None
        ),
        "max_error": result.error.largest if result.error else None,
        "rms_error": result.error.rms if result.error else None,
        "error_budget": {"max": result.budget.largest, "rms": result.budget.rms} if result.budget else None,
    }


if __name__ == "__main__":
    sys.exit(main())
