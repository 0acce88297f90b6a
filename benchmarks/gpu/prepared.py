"""The stages of the two prepared runs, ``first.sh`` and ``second.sh``: a quarter of an hour on one GPU.

The first asks whether it is right, stages side by side on the one device; the second how fast it is, each stage with
the device to itself. Seconds are estimates for an H200 with 16 cores until a run has replaced them; limits end a stage.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.stage import Stage

# The layer of Llama-3.1-8B, and one of a CPU's size.
_LAYER = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128, "block_size": 16, "chunk": 8192}
_TOY_LAYER = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "block_size": 32, "chunk": 256}
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
    Stage(
        "layer_line",
        "benchmarks.gpu.layer_speed:layer_line",
        12,
        "a triangle layer against FlashAttention 3 at 32K and 128K",
        {
            "layer": _LAYER,
            "lengths": [32768, 131072],
            "ours": "trimix_triton",
            "repeats": 20,
            "targets": [[32768, 18], [131072, 60]],
        },
        {"layer": _TOY_LAYER, "lengths": [400], "ours": "trimix_cpu", "repeats": 2, "targets": [[400, 0.01]]},
        use="prepared",
        limit=30,
        prepare=150,
        device=8,
    ),
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

SECOND = [
    Stage(
        "served",
        "benchmarks.gpu.served.stage:served",
        130,
        "time to first token to 128K: stock, triangle, pattern; between tokens; a profiled step; short prompts",
        {
            "shape": "llama-3.1-8b",
            # 105 blocks of 64 keys are a density of 0.1 at 128K tokens.
            "trimix": {
                "starting_layer": 16,
                "min_prompt_len": 0,
                "shallow": {"pattern": "block_sparse", "top_k": 105, "min_seq_len": 0},
            },
            "chunks": [8192, 2048],
            "lengths": [131072, 32768, 65536],
            "lengths_of_other_chunks": [131072, 32768],
            "rounds": 5,
            "stock_length": 32768,
            "stock_rounds": 5,
            "decode": {"length": 1024, "prompts": 16, "tokens": 64, "repeats": 3},
            "profile": {"length": 65536, "step": 6},
            "short": [512, 1024, 2048, 4096],
            "short_repeats": 20,
            "warm_up": 32768,
            # Seconds a token, and a pair of tokens: 10 s of a stock prompt of 128K.
            "cost": [2.5e-5, 4e-10],
            "target_density": 0.11,
            "engine": {"compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16]}},
            # Of the stages that wait beside it.
            "reserve_gib": 16,
            "start_limit": 140,
            "answer_limit": 60,
            "box": 130,
        },
        {
            "shape": "bench-8l",
            "trimix": {
                "starting_layer": 4,
                "min_prompt_len": 0,
                "n_local": 64,
                "last_n": 32,
                "shallow": {"pattern": "block_sparse", "top_k": 2, "min_seq_len": 0},
            },
            "chunks": [256, 128],
            "lengths": [512],
            "lengths_of_other_chunks": [512],
            "rounds": 1,
            "stock_length": 512,
            "stock_rounds": 1,
            "decode": {"length": 64, "prompts": 4, "tokens": 8, "repeats": 1},
            "profile": {"length": 512, "step": 1},
            "short": [128],
            "short_repeats": 2,
            "warm_up": 256,
            "cost": [1e-3, 0.0],
            "engine": {"enforce_eager": True, "dtype": "float32"},
            "start_limit": 400,
            "answer_limit": 120,
        },
        use="prepared",
        limit=140,
        # The engines' own limit and an answer's: one that hangs must not end the others.
        prepare=205,
        device=130,
    ),
    Stage(
        "ways",
        "benchmarks.gpu.layer_speed:ways",
        12,
        "the three ways of prefill at 128K, last rows by FlashAttention, and dense",
        {
            "layer": _LAYER,
            "lengths": [131072],
            "ways": ["trimix_triton", "trimix_triton_stock_tail", "trimix_flash_merge", "trimix_flash_pages"],
            "repeats": 20,
        },
        {"layer": _TOY_LAYER, "lengths": [400], "ways": ["trimix_cpu", "trimix_cpu_sdpa"], "repeats": 2},
        use="prepared",
        limit=30,
        prepare=120,
        device=8,
    ),
    Stage(
        "tiles",
        "benchmarks.gpu.layer_speed:tile_table",
        8,
        "which launch shape is the fastest by head size, and the line to paste where the shipped one is not",
        {
            "layers": [
                _LAYER,
                {**_LAYER, "head_size": 64},
                {**_LAYER, "num_heads": 16, "num_kv_heads": 4, "head_size": 256},
            ],
            "length": 32768,
            "ours": "trimix_triton",
            "candidates": None,
            "repeats": 20,
        },
        {"layers": [_TOY_LAYER], "length": 400, "ours": "trimix_cpu", "candidates": ["trimix_cpu_sdpa"], "repeats": 2},
        use="prepared",
        limit=30,
        prepare=120,
        device=5,
    ),
]
