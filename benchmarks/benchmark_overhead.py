"""What TRIMIX costs besides attention: planning time of a step, and memory over many requests.

python -m benchmarks.benchmark_overhead --output benchmarks/results/NAME
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from benchmarks.environment import environment
from benchmarks.servers import Configuration, Server, serve
from vllm_trimix.cli.main import main as trimix_cli
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Request, build_plan


def plan_time(num_requests: int = 64, num_prefill: int = 4, repeats: int = 2000) -> dict[str, float]:
    """Median and 99th percentile of building one step's plan, in microseconds."""
    chunk = 512
    lengths = [chunk] * num_prefill + [1] * (num_requests - num_prefill)
    starts = [sum(lengths[:index]) for index in range(num_requests + 1)]
    seq_lens = [20000] * num_prefill + [9001] * (num_requests - num_prefill)
    # One of the four ends its prompt in this step.
    requests = [Request(20000 if index == 0 else 32000) for index in range(num_prefill)]
    requests += [Request(9000)] * (num_requests - num_prefill)
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        plan = build_plan(starts, seq_lens, requests, pattern=Triangle(), min_prompt_len=4096)
        samples.append(1e6 * (time.perf_counter() - start))
    assert len(plan.triangle) == num_prefill
    samples.sort()
    return {"median_us": round(statistics.median(samples), 1), "p99_us": round(samples[int(0.99 * repeats)], 1)}


def memory_slope(server: Server, *, first: int = 100, last: int = 200) -> dict[str, float]:
    """Resident bytes a request, from the ``first`` to the ``last`` of a mix of short, long and opted-out requests."""
    generator = random.Random(0)
    at_first = 0
    for number in tqdm(range(last), unit="request"):
        length = generator.choice([5, 300, 1500, 5000])
        body = {
            "model": "bench",
            "prompt": [generator.randrange(3, 4000) for _ in range(length)],
            "max_tokens": generator.choice([1, 8]),
            "ignore_eos": True,
        }
        if generator.random() < 0.3 and server.configuration.trimix is not None:
            body["vllm_xargs"] = {"trimix": "off"}
        server.client.post("/v1/completions", json=body).raise_for_status()
        if number + 1 == first:
            at_first = server.peak_memory()
    return {"bytes_per_request": (server.peak_memory() - at_first) / (last - first)}


def tracked_when_idle(log: str) -> int:
    """Requests still known, from the last line the server wrote about its rows."""
    return int(log.rsplit("TRIMIX rows:", 1)[1].split("requests=", 1)[1].split()[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cpus", default="0")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = {"environment": environment(), "plan_64_requests_4_prefill": plan_time()}
    trimix = {"starting_layer": 4, "min_prompt_len": 0, "stats_log_interval": 1.0}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "bench"
        trimix_cli(["make-bench-model", str(model), "--shape", "bench-8l"])
        for configuration in (Configuration("stock", None), Configuration("trimix", trimix)):
            with serve(
                configuration,
                model,
                Path(scratch),
                max_model_len=8192,
                cpus=args.cpus,
                arguments=["--load-format=dummy", "--dtype=bfloat16", "--enforce-eager"],
            ) as server:
                result[f"memory_{configuration.name}"] = memory_slope(server)
                if configuration.trimix is not None:
                    time.sleep(2.5)
                    result["tracked_requests_when_idle"] = tracked_when_idle(server.log.read_text())
    text = json.dumps(result, indent=1)
    (args.output / "result.json").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
