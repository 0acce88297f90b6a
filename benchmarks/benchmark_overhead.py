"""What TRIMIX costs besides attention: planning time of a step, and memory over many requests.

python -m benchmarks.benchmark_overhead --output benchmarks/results/NAME
"""

from __future__ import annotations

if not __package__:
    # Started by its file.
    import as_module

    as_module.run(__file__)

import argparse
import itertools
import json
import os
import random
import statistics
import sys
import tempfile
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass
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

from benchmarks.environment import environment
from benchmarks.serving.configurations import Configuration
from benchmarks.serving.servers import Server, serve
from vllm_trimix.backend import requests, settings
from vllm_trimix.cli.main import main as trimix_cli
from vllm_trimix.plan import Request


def _no_metadata(*_: object) -> SimpleNamespace:
    """In place of the dense backend's builds."""
    return SimpleNamespace()


@dataclass
class PlannedStep:
    """One step of a batch, and a real builder that plans it.

    Attributes:
        builder: Of the layers of one KV-cache group; only the dense backend's own builds are left out.
        common: vLLM's metadata of the step.
        step: What the runner's wrapper knows of it.
        runner: Its model runner, which the step refers to weakly.
    """

    builder: Any
    common: CommonAttentionMetadata
    step: requests.Step
    runner: Any

    def build(self, *, fresh: bool = True) -> Any:
        """The step's metadata, as its first KV-cache group builds it, or as another one does after that."""
        if fresh:
            self.forget()
        with self.current(), mock.patch.object(self.builder.dense_builder_cls, "build", new=_no_metadata):
            return self.builder.build(0, self.common)

    def forget(self) -> None:
        """Makes the next build the step's first one."""
        self.step.planned = False
        self.step.plans.clear()

    def current(self) -> AbstractContextManager[Any]:
        """Within it, the step is the one that runs."""
        return mock.patch.object(requests, "_current", self.step)


def planned_step(model: Path, *, num_requests: int, num_prefill: int, layers: str = "4-7") -> PlannedStep:
    """A step of a batch: chunks of prompts, and decodes.

    One of the prompts ends in this step, so that the dense remainder has a last-rows part beside the decodes.
    """
    vllm_config = EngineArgs(
        model=str(model),
        attention_backend="TRIMIX",
        additional_config={"trimix": {"layers": layers}},
        max_model_len=40960,
        dtype="bfloat16",
        max_num_seqs=max(128, num_requests),
    ).create_engine_config()
    names = [f"model.layers.{layer}.self_attn.attn" for layer in range(8)]
    with set_current_vllm_config(vllm_config):
        attention = [Attention(8, 64, 0.125, 2, cache_config=vllm_config.cache_config, prefix=name) for name in names]
        backend = attention[0].get_attn_backend()
        builder = backend.get_builder_cls()(
            attention[0].get_kv_cache_spec(vllm_config), names, vllm_config, torch.device("cpu")
        )
    num_decodes = num_requests - num_prefill
    rows = [512] * num_prefill + [1] * num_decodes
    seq_lens = torch.tensor([20000] * num_prefill + [9001] * num_decodes, dtype=torch.int32)
    query_start_loc = torch.tensor([0, *itertools.accumulate(rows)], dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=query_start_loc,
        query_start_loc_cpu=query_start_loc,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=num_requests,
        num_actual_tokens=sum(rows),
        max_query_len=max(rows),
        max_seq_len=20000,
        block_table_tensor=torch.zeros(num_requests, 320, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(rows), dtype=torch.int64),
        positions=torch.zeros(sum(rows), dtype=torch.int64),
        is_prefilling=torch.tensor([True] * num_prefill + [False] * num_decodes),
    )
    ids = [str(index) for index in range(num_requests)]
    runner = mock.Mock(spec=["vllm_config", "input_batch"], vllm_config=vllm_config)
    runner.input_batch.req_ids = ids
    step = requests.Step(runner, settings.of(vllm_config))
    prompt_lens = ([20000] + [32000] * (num_prefill - 1) if num_prefill else []) + [9000] * num_decodes
    step.requests = {name: Request(length) for name, length in zip(ids, prompt_lens, strict=True)}
    return PlannedStep(builder, common, step, runner)


def plan_time(planned: PlannedStep, *, spans: int, repeats: int = 1000) -> dict[str, Any]:
    """Time of our part of building one step's metadata, in microseconds, on one thread as in a worker with one core.

    What stands in for the dense backend's own builds takes a few microseconds of it, measured beside it.

    Raises:
        RuntimeError: Other than ``spans`` triangle spans were planned.
    """
    metadata = planned.build()
    found = len(metadata.trimix.spans) if metadata.trimix is not None else 0
    if found != spans:
        raise RuntimeError(f"expected {spans} triangle spans, planned {found}")
    samples, empty = [], []
    with planned.current(), mock.patch.object(planned.builder.dense_builder_cls, "build", new=_no_metadata):
        for _ in range(repeats):
            planned.forget()
            start = time.perf_counter()
            planned.builder.build(0, planned.common)
            middle = time.perf_counter()
            planned.builder.dense_builder_cls.build(planned.builder, 0, planned.common)
            samples.append(1e6 * (middle - start))
            empty.append(1e6 * (time.perf_counter() - middle))
    ordered = sorted(samples)
    return {
        "median_us": round(statistics.median(ordered), 1),
        "p99_us": round(ordered[int(0.99 * repeats)], 1),
        "stand_in_median_us": round(statistics.median(empty), 1),
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
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, "OMP_NUM_THREADS": "1"})
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
        result["plan_64_requests_4_prefill"] = plan_time(planned_step(model, num_requests=64, num_prefill=4), spans=4)
        for num_requests in (64, 256, 512):
            planned = planned_step(model, num_requests=num_requests, num_prefill=0)
            result[f"plan_{num_requests}_decodes"] = plan_time(planned, spans=0)
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
