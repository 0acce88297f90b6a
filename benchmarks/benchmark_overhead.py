"""What TRIMIX costs besides attention: planning time of a step, and memory over many requests.

python -m benchmarks.benchmark_overhead --output benchmarks/results/NAME
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from tqdm import tqdm
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import CommonAttentionMetadata

from benchmarks.configurations import Configuration
from benchmarks.environment import environment
from benchmarks.servers import Server, serve
from vllm_trimix.backend import requests, settings
from vllm_trimix.cli.main import main as trimix_cli
from vllm_trimix.plan import Request


def _no_metadata(*_: object) -> SimpleNamespace:
    """In place of the dense backend's builds."""
    return SimpleNamespace()


def plan_time(model: Path, *, num_requests: int = 64, num_prefill: int = 4, repeats: int = 1000) -> dict[str, Any]:
    """Time of our part of building one step's metadata, in microseconds, on one thread as in a worker with one core.

    vLLM's real builder runs on a real step; only the dense backend's own two builds are left out. One of the prompts
    ends in this step, so that the dense remainder has a last-rows part beside the decodes.
    """
    vllm_config = EngineArgs(
        model=str(model),
        attention_backend="TRIMIX",
        additional_config={"trimix": {"starting_layer": 4}},
        max_model_len=40960,
        dtype="bfloat16",
    ).create_engine_config()
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(8)]
    with set_current_vllm_config(vllm_config):
        layers = [Attention(8, 64, 0.125, 2, cache_config=vllm_config.cache_config, prefix=name) for name in names]
        backend = layers[0].get_attn_backend()
        builder = backend.get_builder_cls()(
            layers[0].get_kv_cache_spec(vllm_config), names, vllm_config, torch.device("cpu")
        )
    rows = [512] * num_prefill + [1] * (num_requests - num_prefill)
    seq_lens = torch.tensor([20000] * num_prefill + [9001] * (num_requests - num_prefill), dtype=torch.int32)
    query_start_loc = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=num_requests,
        num_actual_tokens=sum(rows),
        max_query_len=512,
        max_seq_len=20000,
        block_table_tensor=torch.zeros(num_requests, 320, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(rows), dtype=torch.int64),
        positions=torch.zeros(sum(rows), dtype=torch.int64),
        is_prefilling=torch.ones(num_requests, dtype=torch.bool),
    )
    ids = [str(index) for index in range(num_requests)]
    runner = mock.Mock(spec=["vllm_config", "input_batch"], vllm_config=vllm_config)
    runner.input_batch.req_ids = ids
    step = requests.Step(runner, settings.of(vllm_config))
    prompt_lens = [20000] + [32000] * (num_prefill - 1) + [9000] * (num_requests - num_prefill)
    step.requests = {name: Request(length) for name, length in zip(ids, prompt_lens, strict=True)}
    samples = []
    with (
        mock.patch.object(requests, "_current", step),
        mock.patch.object(builder.dense_builder_cls, "build", side_effect=_no_metadata),
    ):
        for _ in range(repeats):
            step.planned = False
            start = time.perf_counter()
            metadata = builder.build(0, common)
            samples.append(1e6 * (time.perf_counter() - start))
    if len(metadata.trimix.spans) != num_prefill:
        raise RuntimeError(f"expected {num_prefill} triangle spans, planned {metadata.trimix.spans}")
    ordered = sorted(samples)
    return {
        "median_us": round(statistics.median(ordered), 1),
        "p99_us": round(ordered[int(0.99 * repeats)], 1),
        "samples_us": [round(sample, 1) for sample in samples],
    }


def memory_slope(server: Server, *, first: int, last: int, every: int = 20) -> dict[str, Any]:
    """Resident bytes a request, from the ``first`` to the ``last`` of a mix of short, long and opted-out requests.

    The slope of a line through a sample every ``every`` requests; what the first ones make once is not in it.
    """
    generator = random.Random(0)
    samples = []
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
        if number + 1 >= first and (number + 1 - first) % every == 0:
            samples.append((number + 1, server.memory()))
    line = statistics.linear_regression([float(number) for number, _ in samples], [memory for _, memory in samples])
    return {"bytes_per_request": round(line.slope, 1), "samples": samples}


def tracked_when_idle(log: str) -> int:
    """Requests still known, from the last line the server wrote about its rows."""
    return int(log.rsplit("TRIMIX rows:", 1)[1].split("requests=", 1)[1].split()[0])


def main() -> None:
    if os.environ.get("OMP_NUM_THREADS") != "1":
        # Read when torch is loaded, so it must be there before this process starts.
        os.execve(
            sys.executable, [sys.executable, "-m", __spec__.name, *sys.argv[1:]], {**os.environ, "OMP_NUM_THREADS": "1"}
        )
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--cpus", default="0", help="cores of each server's worker, on CPU machines")
    parser.add_argument(
        "--requests",
        type=int,
        default=300,
        help="served for the memory figure, which leaves the first third out; 0: none",
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    result: dict[str, object] = {"environment": environment()}
    trimix = {"starting_layer": 4, "min_prompt_len": 0, "stats_log_interval": 1.0}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "bench"
        trimix_cli(["make-bench-model", str(model), "--shape", "bench-8l"])
        result["plan_64_requests_4_prefill"] = plan_time(model)
        served = (Configuration("stock", None), Configuration("trimix", trimix)) if args.requests else ()
        for configuration in served:
            with serve(
                [configuration],
                model,
                Path(scratch),
                max_model_len=8192,
                cpus=args.cpus,
                arguments=["--load-format=dummy", "--dtype=bfloat16", "--enforce-eager"],
            ) as [server]:
                result[f"memory_{configuration.name}"] = memory_slope(
                    server, first=args.requests // 3, last=args.requests
                )
                if configuration.trimix is not None:
                    time.sleep(2.5)
                    result["tracked_requests_when_idle"] = tracked_when_idle(server.text())
    (args.output / "result.json").write_text(json.dumps(result) + "\n")
    for name, value in result.items():
        figures = value if not isinstance(value, dict) else {k: v for k, v in value.items() if "samples" not in k}
        print(f"{name}: {figures}")


if __name__ == "__main__":
    main()
