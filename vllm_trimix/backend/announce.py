"""What the log says: one line at start, one line per fallback reason, one line per interval about what ran."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.distributed.parallel_state import get_world_group
from vllm.logger import init_logger

from vllm_trimix.backend import compat, settings
from vllm_trimix.backend.survey import Survey
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
    "stock_layers": "no layer of the set can be sparse in this model, see the start-up line: everything stays dense",
    "not_causal": "bidirectional steps stay dense",
    "ubatch": "micro-batching (DBO) is on: everything stays dense",
    "prompt_len_unknown": "the prompt length of some rows is unknown; they stay dense",
}

FIXES = {
    "sliding_window": "choose layers without a sliding window",
    "no_attention": "choose layers that have attention",
    "soft_cap": "soft caps are supported on GPUs",
    "fp8_kv_on_cpu": "leave --kv-cache-dtype unset",
    "head_size": "the kernels don't take heads of this size",
    "learned_sinks": "models with learned sinks are not supported",
    "other_backend": "choose layers whose kind has the backend TRIMIX",
}
"""What to do where nothing can be sparse, by reason."""

_started: set[str] = set()


def is_rank_zero() -> bool:
    """Whether this process speaks for the engine."""
    try:
        return bool(get_world_group().rank == 0)
    except AssertionError:
        return True


def start(vllm_config: Any, resolved: Resolved, *, dense: str, kernel: str, found: Survey) -> None:
    """Says once per engine, from rank 0, what runs; loudly, where nothing does.

    Args:
        vllm_config: The engine's configuration.
        resolved: What runs.
        dense: Name of the dense backend built on.
        kernel: Name of the triangle kernel.
        found: What the layers are.
    """
    if vllm_config.instance_id in _started or not is_rank_zero():
        return
    _started.add(vllm_config.instance_id)
    untested = compat.untested_reason()
    line = start_line(resolved, dense=dense, kernel=kernel, stock=found.stock)
    if untested is None:
        logger.info(line)
    else:
        logger.warning("%s (%s)", line, untested)
    warning = nothing_sparse(resolved, found)
    if warning is not None:
        logger.warning(warning)


def start_line(resolved: Resolved, *, dense: str, kernel: str, stock: Mapping[int, str]) -> str:
    """What runs, in fixed ``key=value`` format.

    Args:
        resolved: What runs.
        dense: Name of the dense backend built on.
        kernel: Name of the triangle kernel.
        stock: Chosen layers that stay stock, with the reason.
    """
    untested = "" if compat.untested_reason() is None else f" vllm={compat.vllm_version()}:untested"
    return (
        f"TRIMIX: layers={format_layers(resolved.layers)} of={resolved.num_layers} pattern=triangle "
        f"n_init={resolved.n_init} n_local={resolved.n_local} last_n={resolved.last_n} "
        f"min_prompt_len={resolved.min_prompt_len} dense={dense} kernel={kernel} "
        f"stock_layers={stock_label(stock)} source={resolved.source} "
        f"shallow={shallow_label(resolved.shallow)}{untested}"
    )


def stock_label(stock: Mapping[int, str]) -> str:
    """Layers by reason, in one word of the start-up line, e.g. ``0-2:sliding_window,5:head_size``."""
    runs: list[tuple[str, list[int]]] = []
    for layer, reason in sorted(stock.items()):
        if runs and runs[-1][0] == reason and runs[-1][1][-1] == layer - 1:
            runs[-1][1].append(layer)
        else:
            runs.append((reason, [layer]))
    return ",".join(f"{format_layers(layers)}:{reason}" for reason, layers in runs) or "none"


def nothing_sparse(resolved: Resolved, found: Survey) -> str | None:
    """One line that says that no chosen layer can be sparse, and why, or None."""
    shallow = () if resolved.shallow is None else resolved.shallow.layers
    chosen = {*resolved.layers, *shallow}
    if not chosen or found.runs_any(chosen):
        return None
    fixes = sorted({FIXES[reason] for reason in found.stock.values() if reason in FIXES})
    leave = "or leave --attention-backend unset" if fixes else "Leave --attention-backend unset"
    return (
        f"TRIMIX: NOTHING IS SPARSE: all chosen layers stay stock ({stock_label(found.stock)}), every prompt runs as "
        f"without TRIMIX. {'; '.join([*fixes, leave])}"
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
