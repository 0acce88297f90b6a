"""A few ratios to stock vLLM, held against what this kind of CPU gave before: ``make bench-check``.

    python -m benchmarks.benchmark_check               # about 5 minutes on two cores; fails when a ratio got worse
    python -m benchmarks.benchmark_check --record      # keeps the run among those that later ones are held against

Engines of one process's forks take turns, and each round gives a ratio; a small model with random weights, so that the
figures say nothing of a real one's gain. A ratio got worse when the interval of its median begins more than 2% above
the highest end recorded on the same kind of CPU: by so much two processes of the same code were seen to differ. Run it
with the machine to itself, before and after a change.
"""

from __future__ import annotations

if not __package__:
    # Started by its file.
    import as_module

    as_module.run(__file__)

import argparse
import dataclasses
import functools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.forks import Fork
from vllm_trimix.demo.bench_model import SHAPES, make_bench_model
from vllm_trimix.measurement.hardware import multiplies_bf16
from vllm_trimix.measurement.intervals import interval_confidence, median_interval

RECORDED = Path(__file__).with_name("bench_check.json")
# Enough for a 95% interval that leaves the extremes out.
ROUNDS = 9
MARGIN = 0.02
"""By how much of a ratio two processes of the same code were seen to differ."""
STOCK = "stock"
TRIANGLE: dict[str, Any] = {"starting_layer": 1}
VERTICAL_SLASH = {"pattern": "vertical_slash", "vertical_size": 500, "slash_size": 700, "min_seq_len": 0}
ENTRIES: dict[str, dict[str, Any] | None] = {
    STOCK: None,
    "triangle": TRIANGLE,
    "triangle + vertical_slash": {**TRIANGLE, "shallow": VERTICAL_SLASH},
}
SERVED = ((8192, (STOCK, "triangle")), (16384, tuple(ENTRIES)))
PLANNED_DECODES = 512
_PLANS = 300

Ratios = dict[str, list[float]]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.benchmark_check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--record", action="store_true", help="keep this run among those that later ones are held to")
    parser.add_argument(
        "--recorded", type=Path, default=RECORDED, metavar="FILE", help="the recorded runs (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="at least 5 (default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="X", help="prompts of X times the lengths, to try the command"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        if args.rounds < 5:
            raise ValueError(f"--rounds: {args.rounds} are too few for an interval; the least is 5")
        if args.record and args.scale != 1:
            raise ValueError(f"--scale: {args.scale:g} is for a trial; leave it out to record a run")
        if not 0 < args.scale <= 1:
            raise ValueError(f"--scale: {args.scale:g} is not above 0 and up to 1")
        recorded = read_recorded(args.recorded)
        if args.record and not args.recorded.parent.is_dir():
            raise ValueError(f"--recorded: {args.recorded.parent} is no folder; make it, or name another file")
    except ValueError as error:
        print(f"benchmark_check: error: {error}", file=sys.stderr)
        return 2
    where = environment()
    found = measure(rounds=args.rounds, scale=args.scale)
    run = {"environment": where, "cpu_kind": cpu_kind(where), "ratios": found}
    lines, worse = compare(run, recorded)
    print("\n".join(lines))
    if args.record:
        recorded.append(run)
        args.recorded.write_text(json.dumps(recorded, indent=1) + "\n")
        print(f"recorded in {args.recorded}")
    return 1 if worse else 0


def read_recorded(path: Path) -> list[dict[str, Any]]:
    """Earlier runs; none where there is no file.

    Raises:
        ValueError: The file holds something else.
    """
    if not path.exists():
        return []
    try:
        runs = json.loads(path.read_text())
        for run in runs:
            for name, ratios in run["ratios"].items():
                if not ratios or not all(isinstance(ratio, int | float) for ratio in ratios):
                    raise ValueError(f"{name}: not a list of numbers")
        if not all(isinstance(run["cpu_kind"], str) for run in runs):
            raise ValueError("a run without its kind of CPU")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"--recorded: {path} holds no runs of this benchmark ({error}); name another file") from None
    return list(runs)


def cpu_kind(where: dict[str, Any]) -> str:
    """What must be the same for two runs' ratios to be comparable: the CPU's model, its cores, its bf16 units."""
    extensions = [name for name in ("amx", "avx512_bf16") if where[name]]
    return ", ".join([str(where["cpu"]), f"{where['cores']} cores", *extensions, _dtype()])


def compare(run: dict[str, Any], recorded: Sequence[dict[str, Any]]) -> tuple[list[str], list[str]]:
    """A table of the run's ratios beside the recorded ones.

    Args:
        run: This one.
        recorded: Earlier ones, of any kind of CPU.

    Returns:
        The lines, and the ratios that got worse: those whose interval begins more than ``MARGIN`` above the highest
        end of this kind of CPU's recorded ones. Better are those whose interval ends below every recorded one.
    """
    same = [earlier for earlier in recorded if earlier["cpu_kind"] == run["cpu_kind"]]
    lines = [f"{run['cpu_kind']}; {run['environment']['date']}; commit {run['environment']['commit']}"]
    if not same:
        kinds = sorted({earlier["cpu_kind"] for earlier in recorded})
        others = f"; the recorded runs are of {' and of '.join(kinds)}" if kinds else ""
        lines.append(f"no run of this kind of CPU is recorded, so nothing is judged{others}")
    worse = []
    for name, ratios in run["ratios"].items():
        low, high = median_interval(ratios)
        said = (
            f"{name}: {statistics.median(ratios):.3f} of stock "
            f"({low:.3f}-{high:.3f}, {interval_confidence(len(ratios)):.0%}, {len(ratios)} rounds)"
        )
        earlier = [median_interval(other["ratios"][name]) for other in same if name in other["ratios"]]
        if earlier:
            least, most = min(low for low, _ in earlier), max(high for _, high in earlier)
            verdict = "as before"
            if low > most * (1 + MARGIN):
                verdict = "WORSE than before"
                worse.append(name)
            elif high < least:
                verdict = "better than before"
            said += f"; {verdict}: {least:.3f}-{most:.3f} in {len(earlier)} recorded run{'s' * (len(earlier) > 1)}"
        lines.append(said)
    if same:
        lines.append(f"worse: an interval that begins more than {MARGIN:.0%} above the highest end recorded")
    return lines, worse


def measure(*, rounds: int, scale: float = 1.0) -> Ratios:
    """The ratios of each round.

    Args:
        rounds: How many; one more warms up.
        scale: Factor of the prompt lengths.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    # Imported once; no plugin is loaded by this.
    import vllm.entrypoints.llm
    import vllm.v1.worker.cpu_worker  # noqa: F401

    served = [(int(length * scale), names) for length, names in SERVED]
    forks: dict[str, Fork] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model, planned = Path(scratch) / "model", Path(scratch) / "planned"
        make_bench_model(model, dataclasses.replace(SHAPES["bench-8l"], layers=2))
        make_bench_model(planned, SHAPES["bench-8l"])
        longest = max(length for length, _ in served) + 1
        try:
            for name, entry in ENTRIES.items():
                forks[name] = Fork(functools.partial(_engine, model, entry, longest))
                forks[name].ask(min(length for length, _ in served))
            found = _served_ratios(forks, served, rounds)
            forks["plan"] = Fork(functools.partial(_planner, planned))
            name = f"planning a step of {PLANNED_DECODES} decodes"
            found[name] = [forks["plan"].ask(None) for _ in range(1 + rounds)][1:]
        finally:
            for fork in forks.values():
                fork.stop()
    return found


def _served_ratios(forks: dict[str, Fork], served: Sequence[tuple[int, Sequence[str]]], rounds: int) -> Ratios:
    found: Ratios = {}
    with tqdm(total=rounds * sum(len(names) for _, names in served), unit="prompt") as bar:
        for length, names in served:
            for number in range(rounds):
                seconds = {}
                for name in names if number % 2 else names[::-1]:
                    seconds[name] = forks[name].ask(length)
                    bar.update()
                for name in names:
                    if name != STOCK:
                        ratios = found.setdefault(f"first token after {length} tokens, {name}", [])
                        ratios.append(round(seconds[name] / seconds[STOCK], 4))
    return found


def _engine(model: Path, entry: dict[str, Any] | None, longest: int) -> Callable[[int], float]:
    """In a fork: seconds to the first token after a prompt of so many tokens."""
    os.environ["VLLM_PLUGINS"] = "" if entry is None else "trimix"
    # Reads at import which plugins may be loaded.
    from vllm import LLM, SamplingParams

    ours = {} if entry is None else {"attention_backend": "TRIMIX", "additional_config": {"trimix": entry}}
    llm = LLM(
        str(model),
        load_format="dummy",
        dtype=_dtype(),
        max_model_len=longest,
        max_num_batched_tokens=2048,
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        **ours,
    )
    params = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True, detokenize=False)

    def seconds(length: int) -> float:
        generator = random.Random(length)
        prompt = [generator.randrange(3, 4000) for _ in range(length)]
        start = time.perf_counter()
        llm.generate([{"prompt_token_ids": prompt}], params, use_tqdm=False)
        return time.perf_counter() - start

    return seconds


def _planner(model: Path) -> Callable[[None], float]:
    """In a fork: our builder's time for a step of decodes over that of the dense backend's own."""
    # Heavy, and it loads the plugin: in this fork alone.
    from benchmarks.benchmark_overhead import planned_step

    planned = planned_step(model, num_requests=PLANNED_DECODES, num_prefill=0)

    def ratio(_message: None) -> float:
        ours, stock = [], []
        with planned.current():
            for _ in range(_PLANS):
                planned.forget()
                start = time.perf_counter()
                planned.builder.build(0, planned.common)
                middle = time.perf_counter()
                planned.builder.dense_builder_cls.build(planned.builder, 0, planned.common)
                stock.append(time.perf_counter() - middle)
                ours.append(middle - start)
        return round(statistics.median(ours) / statistics.median(stock), 4)

    return ratio


def _dtype() -> str:
    return "bfloat16" if multiplies_bf16() else "float32"


if __name__ == "__main__":
    sys.exit(main())
