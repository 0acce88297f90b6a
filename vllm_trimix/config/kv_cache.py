"""How much memory a measuring command's engine gets for its KV cache on a CPU.

vLLM takes 92% of the machine's memory there unless it is told otherwise, and refuses to start where other processes
have more than the rest.
"""

from __future__ import annotations

SPACE = "VLLM_CPU_KVCACHE_SPACE"
"""vLLM's variable for its size, in whole GiB."""

_PROMPTS = 8
# Blocks that nobody counts here: a null block, states of linear layers, a rounded-up page.
_SPARE = 2**27


def token_bytes(*, num_layers: int, num_kv_heads: int, head_size: int, itemsize: int) -> int:
    """Bytes of a token's keys and values."""
    return 2 * num_layers * num_kv_heads * head_size * itemsize


def cache_bytes(per_token: int, num_tokens: int, *, free: int) -> int:
    """The size: room for one longest prompt, and for several of them within a quarter of what is free.

    Args:
        per_token: Bytes of a token's keys and values.
        num_tokens: The longest prompt with its answer.
        free: Bytes of memory that are free for this engine.

    Raises:
        ValueError: One doesn't fit.
    """
    one = per_token * num_tokens + _SPARE
    if one > free:
        raise ValueError(
            f"a KV cache for {num_tokens} tokens takes {one / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB of memory are "
            "free; take shorter prompts, or free some memory"
        )
    return max(one, min(_PROMPTS * one, free // 4))


def fitting_tokens(per_token: int, *, free: int) -> int:
    """The longest prompt and answer that leave half of the free memory to the weights."""
    return max(0, free // 2 - _SPARE) // per_token
