"""What the log says: one line at start, one line per fallback reason, one line per interval about what ran."""

from __future__ import annotations

from typing import Any

from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger

from vllm_trimix.backend import settings
from vllm_trimix.config.entry import Resolved
from vllm_trimix.config.layers import format_layers
from vllm_trimix.config.shallow import Shallow
from vllm_trimix.stats import Stats, log_periodically

logger = init_logger("vllm.vllm_trimix")

REASONS = {
    "short_prompt": "prompts shorter than min_prompt_len, or short enough for the pattern to hide nothing, stay dense",
    "opt_out_dynamic": 'requests with vllm_xargs {"trimix": "triangle"} are dense in the shallow layers',
    "short_chunk": "chunks with fewer rows than a tile are dense in the shallow layers",
    "opt_out": 'requests with vllm_xargs {"trimix": "off"} stay dense',
    "prompt_logprobs": "requests that read prompt rows (prompt_logprobs) stay dense: they measure stock vLLM",
    "pooling": "pooling requests read every prompt row and stay dense",
    "streaming_input": "streaming-input sessions stay dense: their prompt grows",
    "mm_prefix": "requests with bidirectional image spans stay dense",
    "graph_replay": "steps that may replay a decode CUDA graph stay dense",
    "empty_set": "the triangle set is empty: everything stays dense",
    "not_causal": "bidirectional steps stay dense",
    "ubatch": "micro-batching (DBO) is on: everything stays dense",
    "prompt_len_unknown": "the prompt length of some rows is unknown; they stay dense",
}

_started: set[str] = set()


def is_rank_zero() -> bool:
    """Whether this process speaks for the engine."""
    try:
        return bool(get_world_group().rank == 0)
    except AssertionError:
        return True


def start_line(vllm_config: Any, resolved: Resolved, *, dense: str, kernel: str, stock: dict[int, str]) -> None:
    """Says once per engine, from rank 0, what runs: fixed ``key=value`` format.

    Args:
        vllm_config: The engine's configuration.
        resolved: What runs.
        dense: Name of the dense backend built on.
        kernel: Name of the triangle kernel.
        stock: Layers of the triangle set that stay stock, with the reason.
    """
    if vllm_config.instance_id in _started or not is_rank_zero():
        return
    _started.add(vllm_config.instance_id)
    logger.info(
        "TRIMIX: layers=%s of=%d pattern=triangle n_init=%d n_local=%d last_n=%d min_prompt_len=%d "
        "dense=%s kernel=%s stock_layers=%s source=%s shallow=%s",
        format_layers(resolved.layers),
        resolved.num_layers,
        resolved.n_init,
        resolved.n_local,
        resolved.last_n,
        resolved.min_prompt_len,
        dense,
        kernel,
        ",".join(f"{layer}:{reason}" for layer, reason in sorted(stock.items())) or "none",
        resolved.source,
        shallow_label(resolved.shallow),
    )


def shallow_label(shallow: Shallow | None) -> str:
    """What runs outside the triangle set, in one word of the start-up line."""
    if shallow is None:
        return "dense"
    return (
        f"{shallow.label}:layers:{format_layers(shallow.layers)}:min_seq_len:{shallow.min_seq_len}:"
        f"last_n:{shallow.last_n}:source:{shallow.source}"
    )


def start_stats_log(vllm_config: Any, stats: Stats) -> None:
    """Starts the periodic line, on rank 0, unless it is turned off."""
    interval = settings.of(vllm_config).stats_log_interval
    if interval and is_rank_zero():
        log_periodically(stats, interval, logger.info)


def fallback(reason: str) -> None:
    """Says once why something stays dense."""
    if is_rank_zero():
        logger.info("TRIMIX dense (%s): %s", reason, REASONS.get(reason, reason))
