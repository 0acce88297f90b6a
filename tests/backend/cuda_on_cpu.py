"""vLLM's CUDA attention path on CPU tensors: what stands in for the hardware, and nothing else.

Replaced are the dense kernels (FlashAttention, Triton's unified attention, the cache writers) and the questions that
vLLM asks the hardware (platform, FlashAttention version, pinned memory, streams, graph pool). Everything between them
is vLLM's own. Its small bookkeeping kernels (block tables, positions, slot mappings) and the triangle kernel run in
Triton's interpreter, which must be chosen before Triton is imported: import this module first, in a process of its own.
"""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace
from typing import Any

os.environ.update(TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")

import torch
import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

from vllm_trimix.kernels import work_items
from vllm_trimix.kernels.reference import gather_pages, masked_attention

faults: list[str] = []
"""What the stand-ins found wrong with their arguments."""


def use_cpu() -> None:
    """Answers vLLM's questions about the hardware; call before any other vLLM import."""
    platform = CpuPlatform()
    vllm.platforms._current_platform = platform
    # vLLM turns Triton off in CPU builds; the interpreter needs no device.
    vllm.platforms.vllm_version_matches_substr = lambda _: False
    CpuPlatform.get_global_graph_pool = lambda self: None
    # Prompts of these tests are short; their last rows' keys are to be split too.
    work_items._MIN_SPLIT_KEYS, work_items._SPLIT_ALIGNMENT = 16, 16
    from vllm.v1.attention.backends import fa_utils

    # Hopper: FlashAttention 3 schedules ahead of time, into a buffer that its metadata builder keeps.
    fa_utils.get_flash_attn_version = lambda *args, **kwargs: 3
    fa_utils.is_flash_attn_varlen_func_available = lambda: True
    fa_utils.flash_attn_supports_sinks = lambda *args, **kwargs: True
    fa_utils.flash_attn_supports_quant_query_input = lambda: False
    fa_utils.compile_flash_attn_varlen_func_from_specs = None
    fa_utils.flash_attn_varlen_func = flash_attn
    fa_utils.get_scheduler_metadata = schedule_ahead
    fa_utils.reshape_and_cache_flash = write_cache
    from vllm.v1.attention.backends import triton_attn

    triton_attn.unified_attention = unified_attention
    triton_attn.triton_reshape_and_cache_flash = write_cache


def import_model_runner() -> Any:
    """Model runner V2's module, without streams, pinned memory and process groups."""
    from vllm.v1.worker.gpu import buffer_utils

    buffer_utils.is_uva_available = lambda: False
    from vllm.v1.worker.gpu import cudagraph_utils, model_runner

    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True, world_size=1, rank_in_group=0)
    for module in (model_runner, cudagraph_utils):
        module.get_pp_group = lambda: rank
    # Drafts come from the test.
    model_runner.init_speculator = lambda *args, **kwargs: None
    torch.cuda.Stream = lambda *args, **kwargs: None  # type: ignore[misc,assignment]
    torch.cuda.Event = lambda *args, **kwargs: None  # type: ignore[misc,assignment]
    torch.cuda.stream = lambda *args, **kwargs: contextlib.nullcontext()  # type: ignore[assignment]
    return model_runner


def attend(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    out: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seqused_k: torch.Tensor,
    block_table: torch.Tensor,
    scale: float,
) -> None:
    """Causal attention over a paged cache, a request at a time; rows outside every request stay as they are.

    Args:
        q: Queries, [num_tokens, num_heads, head_size].
        k_cache: Keys, [num_blocks, block_size, num_kv_heads, head_size].
        v_cache: Values, like ``k_cache``.
        out: Like ``q``.
        cu_seqlens_q: First row of each request and the end, [num_requests + 1].
        seqused_k: Keys of each request, [num_requests].
        block_table: Pages of each request, [num_requests, max_blocks].
        scale: Softmax scale.
    """
    starts, lens = cu_seqlens_q.tolist(), seqused_k.tolist()
    if len(starts) != len(lens) + 1 or block_table.shape[0] < len(lens):
        faults.append(f"{len(starts) - 1} requests, {len(lens)} lengths, {block_table.shape[0]} block-table rows")
    for index, seq_len in enumerate(lens):
        rows = slice(starts[index], starts[index + 1])
        num_rows = rows.stop - rows.start
        if num_rows <= 0:
            continue
        k, v = (gather_pages(cache.transpose(1, 2), block_table[index], seq_len) for cache in (k_cache, v_cache))
        positions = torch.arange(seq_len - num_rows, seq_len)
        mask = torch.arange(seq_len) <= positions[:, None]
        out[rows] = masked_attention(q[rows], k, v, mask, scale=scale)


def flash_attn(**call: Any) -> None:
    """``flash_attn_varlen_func``: also checks its bounds, and that the schedule is the one made for this call."""
    query_lens = call["cu_seqlens_q"].diff()
    if int(query_lens.max()) > call["max_seqlen_q"] or int(call["seqused_k"].max()) > call["max_seqlen_k"]:
        faults.append(f"bounds {call['max_seqlen_q']}, {call['max_seqlen_k']} are below the lengths")
    if call["window_size"] not in (None, [-1, -1]) or call["softcap"] or call["causal"] is not True:
        faults.append("FlashAttention was not asked for plain causal attention")
    schedule = fingerprint(call["cu_seqlens_q"], call["seqused_k"])
    if call["scheduler_metadata"] is None or not torch.equal(call["scheduler_metadata"], schedule):
        faults.append(f"schedule {call['scheduler_metadata']} is not that of this call, {schedule}")
    attend(
        call["q"],
        call["k"],
        call["v"],
        call["out"],
        call["cu_seqlens_q"],
        call["seqused_k"],
        call["block_table"],
        call["softmax_scale"],
    )


def unified_attention(**call: Any) -> None:
    """Triton's ``unified_attention``."""
    query_lens = call["cu_seqlens_q"].diff()
    if int(query_lens.max()) > call["max_seqlen_q"] or int(call["seqused_k"].max()) > call["max_seqlen_k"]:
        faults.append(f"bounds {call['max_seqlen_q']}, {call['max_seqlen_k']} are below the lengths")
    attend(
        call["q"],
        call["k"],
        call["v"],
        call["out"],
        call["cu_seqlens_q"],
        call["seqused_k"],
        call["block_table"],
        call["softmax_scale"],
    )


def fingerprint(cu_seqlens_q: torch.Tensor, seqused_k: torch.Tensor) -> torch.Tensor:
    """Stands for FlashAttention 3's schedule: its size, with the lengths it was made for as contents."""
    num_requests = seqused_k.shape[0]
    schedule = torch.zeros(1 + -(-num_requests // 4) * 16, dtype=torch.int32)
    schedule[0] = num_requests
    schedule[1 : 1 + num_requests] = cu_seqlens_q.diff()
    schedule[1 + num_requests : 1 + 2 * num_requests] = seqused_k
    return schedule


def schedule_ahead(*, cu_seqlens_q: torch.Tensor, cache_seqlens: torch.Tensor, **_: Any) -> torch.Tensor:
    """``get_scheduler_metadata``."""
    return fingerprint(cu_seqlens_q, cache_seqlens)


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slot_mapping: torch.Tensor,
    *_: Any,
) -> None:
    """``reshape_and_cache_flash``: tokens beyond the slot mapping, and slots below 0, are padding."""
    rows = (slot_mapping >= 0).nonzero()[:, 0]
    slots, block_size = slot_mapping[rows], key_cache.shape[1]
    key_cache[slots // block_size, slots % block_size] = key[rows]
    value_cache[slots // block_size, slots % block_size] = value[rows]
