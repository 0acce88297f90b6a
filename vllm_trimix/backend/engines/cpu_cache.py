"""The KV cache of a command's engine on a CPU: as much as the prompts need, where the user has chosen nothing."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.cpu_resource_utils import get_memory_node_info
from vllm.utils.torch_utils import STR_DTYPE_TO_TORCH_DTYPE

from vllm_trimix.config.kv_cache import SPACE, cache_bytes, fitting_tokens, token_bytes

logger = init_logger("vllm.vllm_trimix")


def choose(vllm_config: Any, flags: Sequence[str]) -> None:
    """Sets the size, on a CPU, unless a flag or a variable of vLLM's has.

    Args:
        vllm_config: The engine's configuration.
        flags: The user's engine flags.

    Raises:
        ValueError: The longest prompt doesn't fit.
    """
    cache = vllm_config.cache_config
    # VLLM_CPU_KVCACHE_SPACE is among these bytes already.
    if not current_platform.is_cpu() or cache.kv_cache_memory_bytes is not None or any(map(_chooses, flags)):
        return
    size = cache_bytes(
        _token_bytes(vllm_config), _longest(vllm_config), free=_free_memory() // vllm_config.parallel_config.world_size
    )
    cache.kv_cache_memory_bytes = size
    logger.info("TRIMIX: KV cache of %.2f GiB, for prompts of up to %d tokens", size / 2**30, _longest(vllm_config))


def longest_fitting(arguments: Any, flags: Sequence[str]) -> int | None:
    """Tokens of the longest prompt and answer whose cache leaves room for the model; None where vLLM chooses the cache.

    Args:
        arguments: The engine's arguments.
        flags: The user's engine flags.
    """
    chosen = arguments.kv_cache_memory_bytes is not None or os.environ.get(SPACE) or any(map(_chooses, flags))
    if not current_platform.is_cpu() or chosen:
        return None
    model = arguments.create_model_config()
    per_token = token_bytes(
        num_layers=model.get_total_num_hidden_layers(),
        num_kv_heads=model.get_total_num_kv_heads(),
        head_size=model.get_head_size(),
        itemsize=model.dtype.itemsize,
    )
    return fitting_tokens(per_token, free=_free_memory())


def _chooses(flag: str) -> bool:
    name = flag.partition("=")[0].replace("_", "-")
    return len(name) > len("--gpu-m") and "--gpu-memory-utilization".startswith(name)


def _longest(vllm_config: Any) -> int:
    """Whole blocks of the longest prompt and answer, and one that vLLM keeps for itself."""
    block = vllm_config.cache_config.block_size or 128
    return int((-(-vllm_config.model_config.max_model_len // block) + 1) * block)


def _token_bytes(vllm_config: Any) -> int:
    """Of one worker."""
    model, parallel, kind = vllm_config.model_config, vllm_config.parallel_config, vllm_config.cache_config.cache_dtype
    dtype = model.dtype if kind == "auto" else STR_DTYPE_TO_TORCH_DTYPE.get(kind, model.dtype)
    return token_bytes(
        num_layers=model.get_num_layers(parallel),
        num_kv_heads=model.get_num_kv_heads(parallel),
        head_size=model.get_head_size(),
        itemsize=dtype.itemsize,
    )


def _free_memory() -> int:
    """As vLLM counts it when it starts."""
    return int(get_memory_node_info().available_memory)
