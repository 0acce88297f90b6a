"""The engine that a breakdown profiles, in a process of its own: ``python -m`` this module.

A job comes as a line of JSON on stdin, a row of the breakdown goes as a line to stdout; the rest is on stderr.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.breakdown.timeline import REQUEST, STEP, attribute, range_name

MAX_OVERHEAD = 0.15
ANSWER_TOKENS = 1


def main() -> None:
    """One configuration."""
    rows = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    job = json.loads(sys.stdin.readline())

    def end_with_parent() -> None:
        while os.read(0, 1):
            pass
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=end_with_parent, daemon=True).start()
    # Heavy: whoever is gone meanwhile must be noticed.
    from vllm.engine.arg_utils import EngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm.v1.engine.llm_engine import LLMEngine

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = EngineArgs.from_cli_args(parser.parse_args(job["engine_args"]))
    # A server's step size: vLLM's defaults differ for offline use.
    engine = LLMEngine.from_engine_args(arguments, usage_context=UsageContext.OPENAI_API_SERVER)
    install_ranges(engine, stock=job["stock"])
    for length in job["lengths"]:
        rows.write(json.dumps({"config": job["config"], **profile(engine, length, job)}) + "\n")
    rows.close()
    # Engine and profiler have nothing left to do; their shutdown may hang or crash.
    sys.stderr.flush()
    os._exit(0)


def install_ranges(engine: Any, *, stock: bool) -> None:
    """Puts profiler ranges around the functions whose time is attributed, in this process only.

    Raises:
        RuntimeError: The engine does not run in this process, or runs another backend than asked for.
    """
    core = getattr(engine.engine_core, "engine_core", None)
    layers = engine.vllm_config.compilation_config.static_forward_context.values()
    impls = {type(layer.impl) for layer in layers if hasattr(layer, "impl")}
    if core is None or not impls:
        raise RuntimeError("the engine's layers are not in this process; run it with one worker, without parallelism")
    if any(hasattr(impl, "trimix_kernel") for impl in impls) is stock:
        raise RuntimeError(f"the engine does not run the backend asked for; its layers are {impls}")
    for name in ("schedule", "update_from_output"):
        _put_range(type(core.scheduler), name, "scheduler")
    for impl in impls:
        impl.forward = _dense_forward(impl.forward)
    if not stock:
        # Stock is served without the package.
        from vllm_trimix.backend.builder import TrimixBuilder
        from vllm_trimix.backend.impl import TrimixImpl
        from vllm_trimix.backend.requests import Step

        for owner, name, category in (
            (TrimixImpl, "_forward_dense", "tail"),
            (TrimixImpl, "_forward_cpu", "triangle body"),
            (TrimixImpl, "_forward_triton", "triangle body"),
            (TrimixBuilder, "_plan", "plan"),
            (TrimixBuilder, "_count", "plan"),
            (TrimixBuilder, "_step_plan", "plan"),
            (Step, "begin", "plan"),
        ):
            _put_range(owner, name, category)
    runner = type(core.model_executor.driver_worker.worker.model_runner)
    execute_model = runner.execute_model

    @functools.wraps(execute_model)
    def step(self: Any, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        # Heavy; loaded by now.
        from torch.profiler import record_function

        with record_function(STEP) if scheduler_output.total_num_scheduled_tokens else contextlib.nullcontext():
            return execute_model(self, scheduler_output, *args, **kwargs)

    runner.execute_model = step


def _put_range(owner: type, name: str, category: str) -> None:
    setattr(owner, name, _ranged(getattr(owner, name), category))


def _ranged(function: Callable[..., Any], category: str) -> Callable[..., Any]:
    # Heavy; loaded by now.
    import torch

    name = range_name(category)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.profiler.record_function(name):
            # The range decides for all that runs inside it, so recording the operators there would only cost time.
            torch.autograd._enable_record_function(False)
            try:
                return function(*args, **kwargs)
            finally:
                torch.autograd._enable_record_function(True)

    return call


def _dense_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward: dense attention, unless the layer is split, whose parts have ranges of their own."""
    dense = _ranged(forward, "dense attention")

    @functools.wraps(forward)
    def call(
        self: Any, layer: Any, query: Any, key: Any, value: Any, cache: Any, metadata: Any, *args: Any, **kwargs: Any
    ) -> Any:
        split = getattr(self, "trimix_active", False) and getattr(metadata, "trimix", None) is not None
        return (forward if split else dense)(self, layer, query, key, value, cache, metadata, *args, **kwargs)

    return call


def profile(engine: Any, length: int, job: dict[str, Any]) -> dict[str, Any]:
    """One row: the request with and without the profiler in turn, after a warm-up of the same length."""
    generator = random.Random(length)
    prompt = [generator.randrange(3, min(4000, job["vocab_size"])) for _ in range(length)]
    _ask(engine, prompt)
    plain: list[tuple[float, float]] = []
    samples = []
    for repeat in range(job["repeats"]):
        if repeat % 2 == 0:
            plain.append(_ask(engine, prompt))
        samples.append(_profiled(engine, prompt))
        if repeat % 2:
            plain.append(_ask(engine, prompt))
    return _row(length, plain, samples)


def _ask(engine: Any, prompt: list[int]) -> tuple[float, float]:
    """Seconds to the first token of one prompt, and how many of them this thread computed."""
    # Heavy; loaded by now.
    import torch
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=ANSWER_TOKENS, temperature=0, ignore_eos=True, detokenize=False)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start, computed = time.perf_counter(), time.thread_time()
    with torch.profiler.record_function(REQUEST):
        engine.add_request(f"{time.monotonic_ns()}", {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            engine.step()
    return time.perf_counter() - start, time.thread_time() - computed


def _profiled(engine: Any, prompt: list[int]) -> dict[str, Any]:
    # Heavy; loaded by now.
    import torch
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    # Without shapes, stacks and memory: they cost several times the rest.
    with torch.profiler.profile(activities=activities) as profiler:
        seconds, computed = _ask(engine, prompt)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "trace.json"
        profiler.export_chrome_trace(str(path))
        found = attribute(json.loads(path.read_text()))
    return {
        "device": found.device,
        "steps": found.steps,
        "profiled_s": seconds,
        "profiled_cpu_s": computed,
        "window_s": found.window_ns / 1e9,
        "seconds": {category: duration / 1e9 for category, duration in found.nanoseconds.items()},
        "ranges": found.ranges,
        "other": {name: duration / 1e9 for name, duration in list(found.other.items())[:8]},
    }


def _row(length: int, plain: list[tuple[float, float]], samples: list[dict[str, Any]]) -> dict[str, Any]:
    """The sample of median time stands for the row, so that its categories sum to its time."""
    wall, cpu = (statistics.median(values) for values in zip(*plain, strict=True))
    sample = sorted(samples, key=lambda sample: sample["profiled_s"])[(len(samples) - 1) // 2]
    overhead = sample["profiled_s"] / wall - 1
    # CPU time hardly sees other processes: it tells the profiler's cost from theirs.
    cpu_overhead = statistics.median(sample["profiled_cpu_s"] for sample in samples) / cpu - 1
    status = "ok"
    # Far below zero is as telling as far above: the two were not timed alike.
    if abs(overhead) > MAX_OVERHEAD:
        cause = "the profiler costs too much" if cpu_overhead > MAX_OVERHEAD else "the machine was busy"
        status = (
            f"refused: {overhead:+.0%} time under the profiler, limit {MAX_OVERHEAD:.0%} "
            f"({cpu_overhead:+.0%} CPU time: {cause})"
        )
    return {
        "length": length,
        "status": status,
        "device": sample["device"],
        "steps": sample["steps"],
        "wall_s": wall,
        "profiled_s": sample["profiled_s"],
        "overhead": overhead,
        "cpu_overhead": cpu_overhead,
        "seconds": sample["seconds"],
        "share": {category: seconds / sample["window_s"] for category, seconds in sample["seconds"].items()},
        "ranges": sample["ranges"],
        "other": sample["other"],
        "samples": [
            {"wall_s": wall, "cpu_s": cpu, **sample} for (wall, cpu), sample in zip(plain, samples, strict=True)
        ],
    }


if __name__ == "__main__":
    main()
