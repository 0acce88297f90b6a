"""One vLLM engine in a process of its own, asked by lines of JSON: ``python -m benchmarks.gpu.served.child FD``.

The first line on stdin is the job, ``{"engine": {vLLM's arguments}, "stock": bool}``; its answer holds ``ready``, the
seconds until the engine could be asked. Each further line is ``{"ask": "generate" | "profile", ...}``; every answer is
one line on FD. Standard output and error are vLLM's log. The end of stdin ends the process. Engine and scheduler live
in this process, so that TRIMIX's counters can be read and an idle engine does nothing.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.breakdown.engine import install_ranges
from benchmarks.breakdown.timeline import REQUEST, attribute

_STEP_LIMIT = 10_000


def main(descriptor: str) -> None:
    """Answers until there is nothing more to ask."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with os.fdopen(int(descriptor), "w", buffering=1) as answers:
        job = json.loads(sys.stdin.readline())
        started = time.monotonic()
        engine = _engine(job["engine"])
        answers.write(json.dumps({"ready": time.monotonic() - started, **_facts(engine)}) + "\n")
        asked: dict[str, Callable[..., Any]] = {"generate": generate, "profile": profile}
        for line in sys.stdin:
            message = json.loads(line)
            answers.write(json.dumps(asked[message.pop("ask")](engine, stock=job["stock"], **message)) + "\n")
    # Engine and device have nothing left to do; their shutdown may take long, or hang.
    sys.stdout.flush()
    os._exit(0)


def _engine(arguments: dict[str, Any]) -> Any:
    # Heavy, and timed: the engine's start holds it.
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.llm_engine import LLMEngine

    # A server's defaults: vLLM's differ for offline use.
    return LLMEngine.from_engine_args(EngineArgs(**arguments), usage_context=UsageContext.OPENAI_API_SERVER)


def _facts(engine: Any) -> dict[str, Any]:
    config = engine.vllm_config
    layers = config.compilation_config.static_forward_context.values()
    return {
        "backends": sorted({layer.get_attn_backend().get_name() for layer in layers if hasattr(layer, "impl")}),
        "chunk": config.scheduler_config.max_num_batched_tokens,
        "kv_tokens": config.cache_config.num_gpu_blocks * config.cache_config.block_size,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "vocabulary": config.model_config.get_vocab_size(),
    }


def generate(
    engine: Any, *, stock: bool, mode: str | None, length: int, prompts: int = 1, tokens: int = 1, seed: int = 0
) -> dict[str, Any]:
    """Random prompts, all at once, and what they took.

    Args:
        engine: The engine.
        stock: Whether TRIMIX is left out: there are no counters.
        mode: ``vllm_xargs.trimix``, or None.
        length: Tokens of each prompt.
        prompts: How many.
        tokens: Tokens that each generates.
        seed: Of the prompts.

    Returns:
        ``ttft_s``, from the first request handed in to the last first token; ``vllm_ttft_s``, the slowest request's by
        vLLM's own clock; ``between_s``, between two tokens of every request once all generate; ``rows``, what TRIMIX
        counted meanwhile.
    """
    requests = _requests(engine, mode=mode, length=length, prompts=prompts, tokens=tokens, seed=seed)
    _synchronize()
    before = counters() if not stock else Counter[str]()
    started = time.perf_counter()
    for request in requests:
        engine.add_request(*request)
    reached: dict[str, list[float]] = {}
    latencies = []
    for _ in range(_STEP_LIMIT):
        outputs = engine.step()
        now = time.perf_counter()
        for output in outputs:
            times = reached.setdefault(output.request_id, [])
            times += [now] * (len(output.outputs[0].token_ids) - len(times))
            if output.finished and output.metrics is not None:
                latencies.append(output.metrics.first_token_latency)
        if not engine.has_unfinished_requests():
            break
    _synchronize()
    counted = counters() - before if not stock else before
    first = max(times[0] for times in reached.values())
    # Steps in which no prompt is left: every request gets a token at the same time.
    steps = sorted({moment for times in reached.values() for moment in times if moment >= first})
    return {
        "ttft_s": first - started,
        "vllm_ttft_s": max(latencies, default=None),
        "between_s": [later - earlier for earlier, later in itertools.pairwise(steps)],
        "rows": dict(counted),
    }


def _requests(
    engine: Any, *, mode: str | None, length: int, prompts: int, tokens: int, seed: int
) -> list[tuple[str, dict[str, list[int]], Any]]:
    """What ``add_request`` takes, made before the clock runs."""
    # Heavy; loaded by now.
    from vllm import SamplingParams

    generator = random.Random(seed)
    vocabulary = engine.vllm_config.model_config.get_vocab_size()
    # Special tokens are at either end of the vocabulary.
    words = range(vocabulary // 8, vocabulary // 2)
    params = SamplingParams(
        temperature=0,
        max_tokens=tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args=None if mode is None else {"trimix": mode},
    )
    return [
        (f"{seed}-{number}", {"prompt_token_ids": generator.choices(words, k=length)}, params.clone())
        for number in range(prompts)
    ]


def counters() -> Counter[str]:
    """TRIMIX's counters of this process since its start; rows of dynamic layers begin with ``dynamic_``."""
    # Heavy; loaded by now where TRIMIX serves.
    from vllm_trimix.backend import requests

    found: Counter[str] = Counter()
    for step in requests.all_steps():
        found.update(step.stats.snapshot())
        found.update({f"dynamic_{key}": value for key, value in step.stats.dynamic_rows.items()})
    return found


def profile(
    engine: Any, *, stock: bool, mode: str | None, length: int, step: int, seed: int = 0, most: int = 12
) -> dict[str, Any]:
    """Where the time of one prompt's ``step``-th chunk goes, counted from 0, with the device idle before and after.

    Args:
        engine: The engine.
        stock: As for ``generate``.
        mode: As for ``generate``.
        length: Tokens of the prompt.
        step: Which chunk.
        seed: Of the prompt.
        most: Kernels to name.

    Returns:
        What was found, or ``failed`` and why: a profiler that refuses must not cost the engine.
    """
    try:
        if not getattr(engine, "has_breakdown_ranges", False):
            engine.has_breakdown_ranges = True
            install_ranges(engine, stock=stock)
        for request in _requests(engine, mode=mode, length=length, prompts=1, tokens=1, seed=seed):
            engine.add_request(*request)
        for _ in range(step):
            engine.step()
        _synchronize()
        found = _profiled_step(engine, most)
    except Exception as error:
        traceback.print_exc()
        found = {"failed": f"{type(error).__name__}: {error}"[:300]}
    while engine.has_unfinished_requests():
        engine.step()
    return found


def _profiled_step(engine: Any, most: int) -> dict[str, Any]:
    # Heavy; loaded by now.
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
    started = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler, torch.profiler.record_function(REQUEST):
        engine.step()
        _synchronize()
    seconds = time.perf_counter() - started
    return {"profiled_s": seconds, **_attributed(profiler, most)}


def _attributed(profiler: Any, most: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text())
    found = attribute(trace)
    on_device = [event for event in trace["traceEvents"] if event.get("cat") == "kernel"]
    seconds: Counter[str] = Counter()
    calls: Counter[str] = Counter()
    for event in on_device or [event for event in trace["traceEvents"] if event.get("cat") == "cpu_op"]:
        seconds[event["name"]] += event.get("dur", 0)
        calls[event["name"]] += 1
    return {
        "device": found.device,
        "window_s": found.window_ns / 1e9,
        "seconds": {category: duration / 1e9 for category, duration in found.nanoseconds.items()},
        "steps": found.steps,
        "kernels": [[name, micro / 1e6, calls[name]] for name, micro in seconds.most_common(most)],
    }


def _synchronize() -> None:
    # Heavy; loaded by now.
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(*sys.argv[1:])
