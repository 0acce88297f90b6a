"""Time to first token and inter-token latency, TRIMIX against stock vLLM, both served, asked in turn.

    python -m benchmarks.benchmark_ttft --output benchmarks/results/NAME

Both servers are up; each round asks stock, then TRIMIX, then the next round the other way round; the idle one is
stopped. The figure is the ratio of medians, with a bootstrap interval. Run it with the machine to itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import statistics
import tempfile
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.servers import Configuration, Server, serve
from vllm_trimix.cli.main import main as trimix_cli


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for result.json and report.md")
    parser.add_argument("--model", type=Path, help="checkpoint or shape; default: the 8-layer bench shape")
    parser.add_argument("--lengths", default="512,1024,2048,4096,8192,16384,32768", help="prompt tokens")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--decode-tokens", type=int, default=32, help="tokens after the first, for latency between them"
    )
    parser.add_argument("--trimix", default='{"starting_layer": 4}', help="the trimix entry, JSON")
    parser.add_argument("--cpus", default="0", help="cores of each server's worker, on CPU machines")
    parser.add_argument("--serve-args", nargs="*", default=["--load-format=dummy", "--dtype=bfloat16"])
    args = parser.parse_args()
    lengths = [int(length) for length in args.lengths.split(",")]
    args.output.mkdir(parents=True, exist_ok=True)
    configurations = [Configuration("stock", None), Configuration("trimix", json.loads(args.trimix))]
    with tempfile.TemporaryDirectory() as scratch, contextlib.ExitStack() as stack:
        model = args.model
        if model is None:
            model = Path(scratch) / "bench"
            trimix_cli(["make-bench-model", str(model), "--shape", "bench-8l"])
        servers = [
            stack.enter_context(
                serve(
                    configuration,
                    model,
                    Path(scratch),
                    max_model_len=max(lengths) + args.decode_tokens + 8,
                    cpus=args.cpus,
                    arguments=args.serve_args,
                )
            )
            for configuration in configurations
        ]
        samples = measure(servers, lengths, repeats=args.repeats, decode_tokens=args.decode_tokens)
    result = {
        "environment": environment(),
        "settings": {
            "trimix": json.loads(args.trimix),
            "serve_args": args.serve_args,
            "cpus": args.cpus,
            "repeats": args.repeats,
            "decode_tokens": args.decode_tokens,
        },
        "rows": summarise(samples),
        "samples": samples,
    }
    (args.output / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.output / "report.md").write_text(report(result))
    print(report(result))


def measure(servers: list[Server], lengths: list[int], *, repeats: int, decode_tokens: int) -> list[dict[str, Any]]:
    """Asks every server every length, interleaved; one warm-up per length and server, not kept."""
    generator = random.Random(0)
    samples = []
    for server in servers:
        with server.awake():
            pass
    with tqdm(total=len(lengths) * (repeats + 1) * len(servers), unit="request") as bar:
        for length in lengths:
            for repeat in range(repeats + 1):
                # A fresh prompt each round, the same for all servers; token 3 and up are ordinary words.
                prompt = [generator.randrange(3, 4000) for _ in range(length)]
                for server in servers if repeat % 2 else servers[::-1]:
                    bar.set_description(f"{length} {server.configuration.name}")
                    with server.awake():
                        timing = server.ask(prompt, max_tokens=1 + decode_tokens)
                    bar.update()
                    if repeat:
                        samples.append(
                            {
                                "config": server.configuration.name,
                                "length": length,
                                "ttft_s": round(timing.ttft, 5),
                                "itl_s": round(timing.itl, 6),
                                "memory_bytes": server.peak_memory(),
                            }
                        )
    return samples


def summarise(samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Medians per configuration and length, with the ratio to stock and its bootstrap interval."""
    rows = []
    for length in dict.fromkeys(sample["length"] for sample in samples):
        stock = [sample for sample in samples if sample["length"] == length and sample["config"] == "stock"]
        for config in dict.fromkeys(sample["config"] for sample in samples):
            mine = [sample for sample in samples if sample["length"] == length and sample["config"] == config]
            ttft, base = [s["ttft_s"] for s in mine], [s["ttft_s"] for s in stock]
            pairs = [a / b for a, b in zip(ttft, base, strict=True)]
            itl, base_itl = [s["itl_s"] for s in mine], [s["itl_s"] for s in stock]
            rows.append(
                {
                    "config": config,
                    "length": length,
                    "concurrency": 1,
                    "repeats": len(mine),
                    "ttft_median_s": statistics.median(ttft),
                    "ttft_ci95_s": interval(ttft),
                    "ratio_to_stock": round(statistics.median(ttft) / statistics.median(base), 4),
                    "pair_ratio_ci95": [round(value, 4) for value in interval(pairs)],
                    "itl_median_s": statistics.median(itl),
                    "itl_ratio_to_stock": round(statistics.median(itl) / statistics.median(base_itl), 4),
                    "peak_memory_bytes": max(s["memory_bytes"] for s in mine),
                }
            )
    return rows


def interval(values: list[float], draws: int = 2000) -> list[float]:
    """95% bootstrap interval of the median."""
    generator = random.Random(0)
    medians = sorted(statistics.median(generator.choices(values, k=len(values))) for _ in range(draws))
    return [medians[int(0.025 * draws)], medians[int(0.975 * draws)]]


def report(result: dict[str, Any]) -> str:
    """The table, as Markdown."""
    env = result["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    device = env["gpu"] or f"{env['cpu']}, worker on core(s) {result['settings']['cpus']}, AMX {env['amx']}"
    lines = [
        f"{device}; {versions}; {env['date']}; commit {env['commit']}; `trimix` = "
        f"`{json.dumps(result['settings']['trimix'])}`; {result['rows'][0]['repeats']} interleaved repeats.",
        "",
        "| prompt tokens | stock TTFT (s) | TRIMIX TTFT (s) | ratio (of pairs) | latency between tokens, ratio |",
        "|---|---|---|---|---|",
    ]
    rows = {(row["config"], row["length"]): row for row in result["rows"]}
    for length in dict.fromkeys(row["length"] for row in result["rows"]):
        stock, mine = rows["stock", length], rows["trimix", length]
        times = (
            f"{row['ttft_median_s']:.3f} ({row['ttft_ci95_s'][0]:.3f}-{row['ttft_ci95_s'][1]:.3f})"
            for row in (stock, mine)
        )
        lines.append(
            f"| {length} | {' | '.join(times)} | {mine['ratio_to_stock']:.2f} "
            f"({mine['pair_ratio_ci95'][0]:.2f}-{mine['pair_ratio_ci95'][1]:.2f}) | {mine['itl_ratio_to_stock']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
