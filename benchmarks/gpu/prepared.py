"""The stages of the two prepared runs, ``first.sh`` and ``second.sh``: a quarter of an hour on one GPU.

The first asks whether it is right, stages side by side on the one device; the second how fast it is, each stage with
the device to itself. Seconds are estimates for an H200 with 16 cores until a run has replaced them; limits end a stage.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.stage import Stage

# An engine that starts beside seven others, twice in a stage at most.
_ENGINE_LIMIT = 150.0


def _engine(name: str, scenario: str, *, graphs: bool, toy: str) -> Stage:
    runner = name.split("_")[1]
    how = "with CUDA graphs" if graphs else "eager"
    return Stage(
        name,
        "benchmarks.gpu.engine:logprobs",
        80,
        f"model runner {runner.upper()}, {how}: log-probabilities and row counters against the masked model",
        {"runner": runner, "graphs": graphs, "scenarios": [scenario], "reruns": 1},
        {"scenarios": [toy], "graphs": False},
        use="beside",
        limit=_ENGINE_LIMIT,
        device=10,
    )


def _circuit(lookup: str, summary: str) -> Stage:
    settings: dict[str, Any] = {"lengths": [16384, 65536], "seeds": 1, "chunk": 7777, "graphs": False}
    return Stage(
        f"circuit_{lookup}",
        "benchmarks.gpu.circuit:circuit",
        75,
        summary,
        {**settings, "lookups": [lookup]},
        {"lengths": [1100, 2048], "chunk": 700},
        use="beside",
        limit=_ENGINE_LIMIT,
        device=15,
    )


FIRST = [
    Stage(
        "kernel_reference",
        "benchmarks.gpu.kernel_reference:kernel_reference",
        100,
        "the Triton kernels against their definitions, those first that most people run",
        {"cases": "ranked", "box": 75, "triage": 25, "sanitize": 40},
        {
            "cases": ["bfloat16-len63", "d128-float16", "sparse-65-columns", "estimate-64-rows-65-keys"],
            "box": 300,
            "sanitize": 0,
        },
        use="beside",
        limit=165,
        device=75,
    ),
    Stage(
        "smoke",
        "benchmarks.gpu.smoke:smoke",
        75,
        "versions, device, doctor; stock and TRIMIX engines answer",
        use="beside",
        limit=_ENGINE_LIMIT,
        device=5,
    ),
    _engine("engine_v2_graphs", "float16-async", graphs=True, toy="float16-async"),
    _circuit("dense", "a circuit model answers one and two hops at 16K and 64K in chunks, triangle and opted out"),
    _circuit("sparse", "the same with the lookup layer sparse: two-hop answers must be wrong"),
    Stage(
        "opt_out",
        "benchmarks.gpu.opt_out:opt_out",
        75,
        "opted-out answers are stock's, bit for bit",
        {"runner": "v2", "graphs": False},
        use="beside",
        limit=_ENGINE_LIMIT,
        device=5,
    ),
    _engine("engine_v2_eager", "bfloat16-sync", graphs=False, toy="one_token_chunks"),
    _engine("engine_v1_graphs", "bfloat16-sync", graphs=True, toy="bfloat16-sync"),
    _engine("engine_v1_eager", "float16-sync", graphs=False, toy="float16-sync"),
    Stage(
        "fp8_kv",
        "benchmarks.gpu.engine:fp8_kv",
        90,
        "fp8 KV cache: the triangle adds no error to stock fp8's own",
        {"kv_cache_dtypes": ["fp8"], "graphs": False},
        use="beside",
        limit=_ENGINE_LIMIT,
        device=5,
    ),
]

SECOND: list[Stage] = []
