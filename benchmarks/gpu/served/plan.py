"""Which engines the served stage starts on a device, and how."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.speed import GIB, server_bytes
from vllm_trimix.demo.bench_model import SHAPES

STOCK = "stock"
_USABLE = 0.95
# Pages of requests that are partly filled, and the page that vLLM keeps empty.
_KV_SLACK = 4096


def plan_engines(settings: dict[str, Any], memory: float) -> dict[str, dict[str, Any]]:
    """Which engines run, by name: those that the device holds, in the order in which they are given up last.

    Args:
        settings: The stage's.
        memory: Bytes of the device.

    Returns:
        For each its step size, longest request, KV-cache bytes, and bytes of everything together.
    """
    shape, decode = SHAPES[settings["shape"]], settings["decode"]
    together = decode["prompts"] * (decode["length"] + decode["tokens"])
    longest = max(settings["lengths"])
    found: dict[str, dict[str, Any]] = {}
    rest = _USABLE * memory - settings["reserve_gib"] * GIB
    wanted = [(f"trimix_{chunk}", chunk, longest) for chunk in settings["chunks"]]
    for name, chunk, length in [*wanted, (STOCK, settings["chunks"][0], settings["stock_length"])]:
        kv, needed = server_bytes(shape, kv_tokens=max(length, together) + _KV_SLACK, kv_element=2)
        if needed > rest:
            break
        rest -= needed
        limit = max(length, decode["length"] + decode["tokens"]) + 16
        found[name] = {"chunk": chunk, "max_model_len": limit, "kv": kv, "bytes": needed}
    return found


def engine_arguments(settings: dict[str, Any], name: str, job: dict[str, Any], model: str) -> dict[str, Any]:
    """vLLM's arguments of one engine; the KV cache has a size, for what vLLM measured would include its neighbours."""
    mine = {} if name == STOCK else {"attention_backend": "TRIMIX", "additional_config": {"trimix": settings["trimix"]}}
    return {
        "model": model,
        "skip_tokenizer_init": True,
        "load_format": "dummy",
        "dtype": "bfloat16",
        "max_model_len": job["max_model_len"],
        "max_num_batched_tokens": job["chunk"],
        "max_num_seqs": settings["decode"]["prompts"],
        "enable_prefix_caching": False,
        "gpu_memory_utilization": 0.05,
        "kv_cache_memory_bytes": job["kv"],
        **settings["engine"],
        **mine,
    }


def engine_environment(name: str, *, cuda: bool) -> dict[str, str]:
    """Variables of an engine's process on top of the stage's."""
    found = {"VLLM_NO_USAGE_STATS": "1"} | ({"VLLM_PLUGINS": ""} if name == STOCK else {})
    # The engines of a rehearsal share cores: threads that spin while they wait would take the others'.
    return found if cuda else found | {"OMP_NUM_THREADS": "1"}
