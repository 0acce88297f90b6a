"""Time to first token in real engines that share the device: each serves stock, triangle and pattern by request.

The engines start side by side, and are warm before the stage asks for the device to itself. Then one works at a time,
the others being idle, in interleaved rounds that fill a box of seconds. Every sample is saved as it comes.
"""

from __future__ import annotations

import contextlib
import math

from benchmarks.gpu.predicted import request_seconds
from benchmarks.gpu.report import Report
from benchmarks.gpu.served.engine import Engine
from benchmarks.gpu.served.engines import Engines
from benchmarks.gpu.served.measurement import Measurement
from benchmarks.gpu.served.plan import STOCK, engine_arguments, engine_environment, plan_engines
from benchmarks.gpu.speed import bench_model

# Of what the stage may still take when it has the device: to end the engines and to save.
_MARGIN_SECONDS = 5.0


def served(report: Report) -> None:
    """Starts the engines, warms them up, and measures round by round."""
    jobs = plan_engines(report.settings, report.environment.get("device_memory_bytes", math.inf))
    if not jobs:
        report.skip("the device is too small for one engine")
        return
    report.figure(
        server_bytes={name: job["bytes"] for name, job in jobs.items()},
        predicted=request_seconds(
            report.environment,
            lengths=report.settings["lengths"],
            chunks=report.settings["chunks"],
            density=report.settings["target_density"],
        )
        if report.settings["shape"] == "llama-3.1-8b"
        else [],
    )
    model = bench_model(
        report.folder / "model", report.settings["shape"], max(job["max_model_len"] for job in jobs.values())
    )
    with contextlib.ExitStack() as stack:

        def make(name: str, attempt: str = "") -> Engine:
            arguments = engine_arguments(report.settings, name, jobs[name], str(model))
            eager = {"enforce_eager": True} if attempt == "eager" else {}
            child = {"engine": arguments | eager, "stock": name == STOCK}
            log = report.folder / f"{'_'.join(filter(None, (name, attempt)))}.log"
            environment = engine_environment(name, cuda=report.cuda)
            return stack.enter_context(Engine(name, child, log, environment=environment))

        engines = Engines(report, {name: make(name) for name in jobs})
        engines.start(make)
        # Even where no engine is left, the runner waits for the stage to ask.
        granted = report.alone() - _MARGIN_SECONDS
        Measurement(report, engines).fill(min(report.settings["box"], granted))
