"""The stages of ``run_all.sh``, the most valuable first, for whoever has a GPU for longer than a quarter of an hour.

Seconds are estimates for an H200 until a run has replaced them.
"""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.real_stages import REAL
from benchmarks.gpu.stage import Stage
from benchmarks.serving.prompts import PUBLISHED_LENGTHS
from benchmarks.serving.rows import PUBLISHED_ROWS

# Stages of a group measure into one folder: its servers' settings must be the same, rounds measured once count for
# all, and the correctness gate runs once.
_SERVED: dict[str, Any] = {
    "shape": "llama-3.1-8b",
    "trimix": {"starting_layer": 16},
    "ideal": True,
    "concurrency": [1],
    "decode_tokens": 32,
    "repeats": 5,
    "serve_arguments": [],
    "rows": "",
    "shallow": {},
    "prompts": "random",
    # Tokens that a server's KV cache holds; the first that fits on the device.
    "kv_tokens": [131072],
}
_FP8 = {"ideal": False, "serve_arguments": ["--kv-cache-dtype=fp8"], "kv_tokens": [524288, 262144]}
# Eager and without the floor: starting servers is all that costs time at this size.
_TOY: dict[str, Any] = {
    "shape": "bench-8l",
    "trimix": {"starting_layer": 4, "min_prompt_len": 0},
    "ideal": False,
    "decode_tokens": 4,
    "repeats": 1,
    "serve_arguments": ["--enforce-eager"],
    "kv_tokens": [4096],
}
_TOY_FP8 = {**_TOY, "serve_arguments": ["--enforce-eager", "--kv-cache-dtype=fp8"]}


def _engine(name: str, *, graphs: bool, scenarios: list[str], toy: str, seconds: float) -> Stage:
    runner = name.split("_")[1]
    how = "with CUDA graphs" if graphs else "eager"
    return Stage(
        name,
        "benchmarks.gpu.engine:logprobs",
        seconds,
        f"model runner {runner.upper()}, {how}: log-probabilities and row counters against the masked model",
        {"runner": runner, "graphs": graphs, "scenarios": scenarios},
        {"scenarios": [toy], "graphs": False},
    )


def _ttft(name: str, lengths: list[int], seconds: float, *, fp8: bool = False, **settings: Any) -> Stage:
    words = " and ".join(f"{length // 1024}K" for length in lengths)
    return Stage(
        name,
        "benchmarks.gpu.speed:ttft",
        seconds,
        f"time to first token at {words} tokens{', fp8 KV' if fp8 else ''}: stock and TRIMIX, Llama-3.1-8B's shape",
        {**_SERVED, **(_FP8 if fp8 else {}), "lengths": lengths, **settings},
        # Both lengths and loads of the group at once: the group's other stages find them measured.
        {**(_TOY_FP8 if fp8 else _TOY), "lengths": [512, 768], "concurrency": [1] if fp8 else [1, 2]},
        "ttft_fp8" if fp8 else "ttft",
    )


_ROW_GROUPS = {name: f"rows_{name.replace('+', '_')}" for name in PUBLISHED_ROWS}
# The published protocol: one warm-up, 3 repeats. Every chunk is by the pattern: at these lengths its early chunks are
# few, and calibrate finds from which length on they pay.
_ROWS: dict[str, Any] = {
    **_SERVED,
    "ideal": False,
    "decode_tokens": 8,
    "repeats": 3,
    "shallow": {"min_seq_len": 0},
    "prompts": "kv-retrieval",
}
_TOY_ROWS = {**_TOY, "lengths": [768, 1024], "concurrency": [1]}


def _rows(name: str, lengths: list[int], seconds: float) -> Stage:
    part = "short" if lengths[0] == PUBLISHED_LENGTHS[0] else "long"
    return Stage(
        f"{_ROW_GROUPS[name]}_{part}",
        "benchmarks.gpu.speed:rows",
        seconds,
        f"{name} at {lengths[0]} to {lengths[-1]} tokens of the published KV-retrieval prompts, with its density",
        {**_ROWS, "rows": name, "lengths": lengths},
        _TOY_ROWS,
        _ROW_GROUPS[name],
    )


STAGES = [
    Stage("smoke", "benchmarks.gpu.smoke:smoke", 75, "versions, device, doctor; stock and TRIMIX engines answer"),
    Stage(
        "kernel_reference",
        "benchmarks.gpu.kernel_reference:kernel_reference",
        120,
        "the Triton kernels against their definitions: dtypes, head sizes, GQA, pages, layouts",
        {"cases": None},
        {
            "cases": [
                "bfloat16-len63",
                "d128-float16",
                "gqa7",
                "page64-BSH",
                "cache-float8_e4m3fn-q-bfloat16",
                "cache-float8_e5m2-q-float16",
                "sparse-65-columns",
                "estimate-64-rows-65-keys",
            ]
        },
    ),
    _engine(
        "engine_v2_graphs",
        graphs=True,
        scenarios=["float16-async", "bfloat16-sync", "one_token_chunks"],
        toy="float16-async",
        seconds=120,
    ),
    Stage(
        "circuit",
        "benchmarks.gpu.circuit:circuit",
        75,
        "retrieval by a circuit model, one and two hops, to 128K in chunks: right and wrong where they must be",
        {
            "lengths": [4096, 20011, 33000, 65536, 131000],
            "seeds": 2,
            "chunk": 7777,
            "graphs": True,
            "lookups": ["dense", "sparse"],
        },
        {"lengths": [1100, 2048], "seeds": 1, "chunk": 700, "graphs": False},
    ),
    Stage(
        "kernels",
        "benchmarks.gpu.speed:kernels",
        150,
        "the triangle kernel beside the dense ones, 8K to 128K",
        {"lengths": [8192, 32768, 65536, 131072], "repeats": 20, "arguments": []},
        {"lengths": [512], "repeats": 2, "arguments": ["--quick"]},
    ),
    _ttft("ttft_128k", [131072], 330),
    _ttft("ttft_32k_64k", [32768, 65536], 150),
    Stage(
        "fp8_kv",
        "benchmarks.gpu.engine:fp8_kv",
        90,
        "fp8 KV cache: the triangle adds no error to stock fp8's own",
        {"kv_cache_dtypes": ["fp8"], "graphs": False},
    ),
    _engine(
        "engine_v1_graphs",
        graphs=True,
        scenarios=["float16-async", "bfloat16-sync", "one_token_chunks"],
        toy="float16-sync",
        seconds=120,
    ),
    _engine(
        "engine_v2_eager",
        graphs=False,
        scenarios=["float16-sync", "bfloat16-async", "float16-async-TRITON_ATTN"],
        toy="one_token_chunks",
        seconds=75,
    ),
    _engine(
        "engine_v1_eager",
        graphs=False,
        scenarios=["float16-sync", "bfloat16-async"],
        toy="bfloat16-async",
        seconds=50,
    ),
    Stage(
        "sync_debug",
        "benchmarks.gpu.sync_debug:sync_debug",
        30,
        "planning and layers never wait for the device",
    ),
    Stage(
        "decode",
        "benchmarks.gpu.speed:decode",
        150,
        "latency between tokens at batch 1 and 16: as fast as stock",
        # With the spread of interleaved medians of 32 tokens, one percent can't be told from none.
        {**_SERVED, "lengths": [7936], "concurrency": [1, 16], "most": 1.02},
        {**_TOY, "lengths": [512], "concurrency": [1, 2]},
        "ttft",
    ),
    Stage(
        "breakdown",
        "benchmarks.gpu.speed:breakdown",
        150,
        "where a prompt's time goes, layer by layer",
        {"shape": "llama-3.1-8b", "trimix": {"starting_layer": 16}, "lengths": [32768], "repeats": 3, "arguments": []},
        {"shape": "bench-8l", "trimix": {"starting_layer": 4, "min_prompt_len": 0}, "lengths": [768], "repeats": 1},
    ),
    _ttft("ttft_256k_fp8", [262144], 300, fp8=True, repeats=2),
    # A warm-up and one round take most of eight minutes; rounds are kept, so another call adds to them.
    _ttft("ttft_512k_fp8", [524288], 470, fp8=True, repeats=1),
    Stage(
        "rows_gate",
        "benchmarks.gpu.speed:gate",
        300,
        "every dynamic row, and each by itself, answers a question about 8K tokens and counts its rows",
        {
            "shape": "llama-3.1-8b",
            "trimix": {"starting_layer": 16},
            "rows": "published",
            "length": 8192,
            "serve_arguments": [],
        },
        {
            "shape": "bench-8l",
            "trimix": {"starting_layer": 4, "min_prompt_len": 0},
            "rows": "minference,trimix+xattention",
            "length": 1024,
            "serve_arguments": ["--enforce-eager"],
        },
    ),
    # All rows side by side, for weights are nothing here; the only ones whose densities are those of sharp heads.
    Stage(
        "rows_circuit",
        "benchmarks.gpu.speed:rows",
        420,
        "all dynamic rows at 32K to 128K tokens of documents, on a circuit model with Llama-3.1-8B's attention",
        {
            **_ROWS,
            "shape": "circuit",
            "rows": "published",
            "prompts": "document",
            "lengths": [32000, 64000, 128000],
        },
        {**_TOY_ROWS, "shape": "circuit", "rows": "trimix+flexprefill", "lengths": [1024]},
        "rows_circuit",
    ),
    *(
        stage
        for name in PUBLISHED_ROWS
        for stage in (
            _rows(name, list(PUBLISHED_LENGTHS[:4]), 400),
            # The group's servers start anew; the gate has passed.
            _rows(name, list(PUBLISHED_LENGTHS[4:]), 470),
        )
    ),
    Stage(
        "rows_256k_fp8",
        "benchmarks.gpu.speed:rows",
        470,
        "TriangleMix + MInference at 256K tokens of KV-retrieval prompts, fp8 KV",
        {
            **_ROWS,
            "rows": "trimix+minference",
            "lengths": [262144],
            "repeats": 1,
            "serve_arguments": ["--kv-cache-dtype=fp8"],
            "kv_tokens": [262144],
        },
        # CPUs have no sparse kernel for fp8 KV.
        _TOY_ROWS,
        "rows_fp8",
    ),
    *REAL,
]
