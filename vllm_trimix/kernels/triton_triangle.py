"""Triangle prefill on CUDA: one paged, GQA-packed Triton kernel with one online softmax, for band and dense rows.

A program owns one work item (``work_items``) and one KV head. Its tile packs ``tile_rows`` tokens times all query heads
of the KV head, so that every key and value is loaded once for the whole group. It first sees the sink keys, in one
short step whose operands stay on chip, then the keys of its window; the two ranges are disjoint, so each key counts
exactly once. Dense items see a part of all keys, write what they found as partial results, and a second small kernel
merges those.

The rule is that of TriangleMix (https://arxiv.org/abs/2507.21526): the query at absolute position ``i`` sees key
``j <= i`` iff ``j < n_init`` or ``i - j < n_local``; dense rows see every ``j <= i``.
"""

import torch
import triton
import triton.language as tl

from vllm_trimix.kernels.layer_call import LayerCall
from vllm_trimix.kernels.triton_attention import (
    accumulate,
    after_all_keys,
    before_any_key,
    cap_scores,
    load_rows,
    logit_scales,
    mask_of,
    scores_of,
    store_rows,
)
from vllm_trimix.kernels.triton_configs import TileConfig, config_for, padded_tile, widened
from vllm_trimix.kernels.triton_launch import (
    LaunchVariant,
    TensorKinds,
    attention_constants,
    capability_for,
    check_call,
    check_devices,
    check_table,
)
from vllm_trimix.kernels.triton_merge import Partials, merge_partials

_INT32_MAX = 2**31 - 1


@triton.jit
def _load_keys(
    kv_ptr,
    pages_ptr,
    first_key,
    begin,
    end,
    offs_d,
    NUM_KEYS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
):
    """[NUM_KEYS, BLOCK_D] keys or values from ``first_key``, a multiple of NUM_KEYS; zeros outside [begin, end)."""
    offs_n = tl.arange(0, NUM_KEYS)
    keys = first_key + offs_n
    # Pages before the window may have been freed, slots past the last row may never have been written.
    is_read = (keys >= begin) & (keys < end)
    if PAGE_SIZE % NUM_KEYS == 0:
        page = tl.load(pages_ptr + first_key // PAGE_SIZE, mask=first_key < end, other=0).to(tl.int64)
        slot = first_key % PAGE_SIZE + offs_n
    else:
        page = tl.load(pages_ptr + keys // PAGE_SIZE, mask=is_read, other=0).to(tl.int64)
        slot = (offs_n if NUM_KEYS % PAGE_SIZE == 0 else keys) % PAGE_SIZE
    rows = page * STRIDE_PAGE + slot.to(tl.int64) * STRIDE_TOKEN
    return load_rows(kv_ptr, rows, is_read, offs_d, HEAD_SIZE, BLOCK_D)


@triton.jit
def triangle_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    partial_ptr,
    partial_stats_ptr,
    block_table_ptr,
    items_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    scale,
    soft_cap,
    n_local,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_table,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SINKS: tl.constexpr,
    SINK_LOOP: tl.constexpr,
    LOOKAHEAD: tl.constexpr,
    SCORE_DTYPE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
    HAS_PARTIALS: tl.constexpr,
):
    """Program i: the rows of item ``i // NUM_KV_HEADS``, for all query heads of KV head ``i % NUM_KV_HEADS``."""
    INT32_MAX: tl.constexpr = 2147483647
    kv_head = (tl.program_id(0) % NUM_KV_HEADS).to(tl.int64)
    item_ptr = items_ptr + (tl.program_id(0) // NUM_KV_HEADS).to(tl.int64) * 8
    pages_ptr = block_table_ptr + tl.load(item_ptr).to(tl.int64) * stride_table
    first_token = tl.load(item_ptr + 1).to(tl.int64)
    num_tokens = tl.load(item_ptr + 2)
    first_position = tl.load(item_ptr + 3)
    begin = tl.load(item_ptr + 4)
    end = tl.load(item_ptr + 5)
    num_sinks = tl.load(item_ptr + 6)
    last_position = first_position + num_tokens - 1
    window = tl.where(num_sinks < 0, INT32_MAX, n_local)

    offs_m = tl.arange(0, BLOCK_M)
    offs_d = tl.arange(0, BLOCK_D)
    row = offs_m // GROUP
    position = (first_position + row)[:, None]
    head = kv_head * GROUP + offs_m % GROUP
    row_mask = mask_of(row < num_tokens, offs_d, HEAD_SIZE, BLOCK_D)
    q_rows = (first_token + row) * stride_q_token + head * stride_q_head
    q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=row_mask, other=0.0).to(SCORE_DTYPE)
    k_ptr += kv_head * STRIDE_HEAD
    v_ptr += kv_head * STRIDE_HEAD

    logit_scale, exponent_scale = logit_scales(
        scale, soft_cap, q_scale_ptr, k_scale_ptr, HAS_SOFT_CAP, HAS_Q_SCALE, HAS_K_SCALE
    )
    acc, row_max, row_sum = before_any_key(BLOCK_M, BLOCK_D)

    # Steps start at multiples of their width: then a page that holds whole steps costs one table lookup a step.
    first_step = begin // BLOCK_N * BLOCK_N
    next_scores = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if LOOKAHEAD:
        k = _load_keys(
            k_ptr, pages_ptr, first_step, begin, end, offs_d,
            BLOCK_N, PAGE_SIZE, HEAD_SIZE, BLOCK_D, STRIDE_PAGE, STRIDE_TOKEN,
        )  # fmt: skip
        next_scores = scores_of(q, k, SCORE_DTYPE)

    if BLOCK_SINKS > 0:
        # One step without a loop where the sinks fit into one.
        sink_end = num_sinks if SINK_LOOP else tl.minimum(1, num_sinks)
        for first_key in tl.range(0, sink_end, BLOCK_SINKS, num_stages=1):
            sinks = _load_keys(
                k_ptr, pages_ptr, first_key, 0, num_sinks, offs_d,
                BLOCK_SINKS, PAGE_SIZE, HEAD_SIZE, BLOCK_D, STRIDE_PAGE, STRIDE_TOKEN,
            )  # fmt: skip
            sink_values = _load_keys(
                v_ptr, pages_ptr, first_key, 0, num_sinks, offs_d,
                BLOCK_SINKS, PAGE_SIZE, HEAD_SIZE, BLOCK_D, STRIDE_PAGE, STRIDE_TOKEN,
            )  # fmt: skip
            scores = scores_of(q, sinks, SCORE_DTYPE)
            if HAS_SOFT_CAP:
                scores = cap_scores(scores, logit_scale, soft_cap)
            keys = (first_key + tl.arange(0, BLOCK_SINKS))[None, :]
            scores = tl.where((keys < num_sinks) & (keys <= position), scores, float("-inf"))
            acc, row_max, row_sum = accumulate(
                acc, row_max, row_sum, scores, sink_values, exponent_scale, COMPUTE_DTYPE
            )

    offs_n = tl.arange(0, BLOCK_N)
    for first_key in tl.range(first_step, end, BLOCK_N):
        v = _load_keys(
            v_ptr, pages_ptr, first_key, begin, end, offs_d,
            BLOCK_N, PAGE_SIZE, HEAD_SIZE, BLOCK_D, STRIDE_PAGE, STRIDE_TOKEN,
        )  # fmt: skip
        k = _load_keys(
            k_ptr, pages_ptr, first_key + BLOCK_N if LOOKAHEAD else first_key, begin, end, offs_d,
            BLOCK_N, PAGE_SIZE, HEAD_SIZE, BLOCK_D, STRIDE_PAGE, STRIDE_TOKEN,
        )  # fmt: skip
        if LOOKAHEAD:
            scores = next_scores
            next_scores = scores_of(q, k, SCORE_DTYPE)
        else:
            scores = scores_of(q, k, SCORE_DTYPE)
        if HAS_SOFT_CAP:
            scores = cap_scores(scores, logit_scale, soft_cap)
        # Steps that every row sees whole need no mask. A row never sees a key that wasn't read.
        end_step = first_key + BLOCK_N
        is_edge = (first_key < begin) | (end_step > tl.minimum(end, first_position + 1))
        if is_edge | (first_key <= last_position - window):
            keys = first_key + offs_n
            # Age of a key as an unsigned number: keys of the future and keys that weren't read are older than any.
            keys = tl.where((keys >= begin) & (keys < end), keys, INT32_MAX)
            age = (position - keys[None, :]).to(tl.uint32, bitcast=True)
            scores = tl.where(age < window.to(tl.uint32, bitcast=True), scores, float("-inf"))
        acc, row_max, row_sum = accumulate(acc, row_max, row_sum, scores, v, exponent_scale, COMPUTE_DTYPE)

    # Loaded again: kept in registers through the loop they would cost it.
    num_tokens = tl.load(item_ptr + 2, volatile=True)
    slot = tl.load(item_ptr + 7, volatile=True) if HAS_PARTIALS else -1
    row_mask = mask_of(row < num_tokens, offs_d, HEAD_SIZE, BLOCK_D)
    if slot < 0:
        result = after_all_keys(acc, row_sum, v_scale_ptr, HAS_V_SCALE)
        first_token = tl.load(item_ptr + 1, volatile=True).to(tl.int64)
        out_rows = (first_token + row) * stride_out_token + head * stride_out_head
        store_rows(out_ptr, out_rows, offs_d, row_mask, result)
    elif HAS_PARTIALS:
        index = tl.cast(slot, tl.int64) * NUM_KV_HEADS + kv_head
        partial_ptr += index * BLOCK_M * BLOCK_D
        partial_stats_ptr += index * 2 * BLOCK_M
        tl.store(partial_ptr + offs_m[:, None] * BLOCK_D + offs_d[None, :], acc, mask=row_mask)
        tl.store(partial_stats_ptr + offs_m, row_max)
        tl.store(partial_stats_ptr + BLOCK_M + offs_m, row_sum)


def triangle_constants(
    config: TileConfig, kinds: TensorKinds, *, tile_rows: int, n_init: int, has_partials: bool = True
) -> dict[str, object]:
    """Compile-time arguments of the kernel: what a variant is keyed on. No length is among them.

    Args:
        config: Launch shape.
        kinds: Of the layer's tensors.
        tile_rows: Tokens of a full tile.
        n_init: Sink keys; only the width of their step is a constant.
        has_partials: Whether items may be parts of split keys.
    """
    block_m, block_d = padded_tile(tile_rows, kinds.group, kinds.head_size)
    block_sinks = 0 if n_init == 0 else min(64, max(16, triton.next_power_of_2(n_init)))
    return {
        **attention_constants(config, kinds),
        "NUM_KV_HEADS": kinds.num_kv_heads,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "BLOCK_SINKS": block_sinks,
        "SINK_LOOP": n_init > block_sinks,
        "HAS_PARTIALS": has_partials,
    }


def triangle_prefill(
    call: LayerCall,
    block_table: torch.Tensor,
    items: torch.Tensor,
    *,
    n_init: int,
    n_local: int,
    tile_rows: int,
    merges: torch.Tensor | None = None,
    partials: Partials | None = None,
    variant: LaunchVariant | None = None,
) -> LaunchVariant:
    """Attention of a step's work items, written to ``call.out`` in place.

    Rows that no item covers stay as they are. The call launches one kernel, or two where keys were split, and never
    waits for the device.

    Args:
        call: The layer's tensors.
        block_table: Page of each block of each request, [num_reqs, max_blocks], int32.
        items: Work items of ``work_items.cut_work``, [num_items, 8], int32. ``work_items.IDLE`` does nothing.
        n_init: Sink keys at the start of the prompt, in tokens, as given to ``cut_work``.
        n_local: Window in tokens, counting the query's own position.
        tile_rows: Tokens of a full tile, as given to ``cut_work``.
        merges: Tiles whose keys were split, [num_merges, 4], int32; None if there are none.
        partials: Workspace for those; needed with ``merges``.
        variant: From an earlier call with tensors of the same kinds: nothing is checked again.

    Returns:
        The variant, for further calls.

    Raises:
        ValueError: A shape, dtype, stride or parameter is outside what the kernel takes.
    """
    if variant is None:
        check_call(call, block_table)
        check_table("items", items, 8)
        if merges is not None:
            check_table("merges", merges, 4)
        check_devices(call.q.device, items=items, merges=merges)
        _check_window(n_init=n_init, n_local=n_local)
        variant = _find_variant(call, tile_rows=tile_rows, n_init=n_init, has_partials=partials is not None)
        if partials is not None:
            _check_partials(partials, variant.constants)
        elif merges is not None:
            raise ValueError(f"merges has {merges.shape[0]} rows, but there is no workspace for partial results")
    if items.shape[0] == 0:
        return variant

    q, k_cache, v_cache, out, scale, soft_cap, scales = call
    num_kv_heads = k_cache.shape[1]
    triangle_prefill_kernel[(items.shape[0] * num_kv_heads,)](
        q,
        k_cache,
        v_cache,
        out,
        None if partials is None else partials.values,
        None if partials is None else partials.stats,
        block_table,
        items,
        *scales,
        float(scale),
        float(soft_cap),
        n_local,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        block_table.stride(0),
        **variant.constants,
        **variant.options,
    )
    if merges is not None and partials is not None:
        merge_partials(partials, merges, out=out, num_kv_heads=num_kv_heads, v_scale=scales.v)
    return variant


def _find_variant(call: LayerCall, *, tile_rows: int, n_init: int, has_partials: bool) -> LaunchVariant:
    q, k_cache = call.q, call.k_cache
    kinds = TensorKinds.of(call)
    group = kinds.group
    capability = capability_for(q.dtype, k_cache.dtype, q.device)
    config = config_for(kinds.head_size, q.element_size(), k_cache.element_size(), capability)
    max_rows = max(1, config.block_m // group)
    if not 1 <= tile_rows <= max_rows:
        raise ValueError(f"tile_rows {tile_rows} is outside 1-{max_rows} for {group} query heads a KV head")
    config = widened(config, padded_tile(tile_rows, group, kinds.head_size)[0])
    constants = triangle_constants(config, kinds, tile_rows=tile_rows, n_init=n_init, has_partials=has_partials)
    return LaunchVariant.of(config, constants)


def _check_partials(partials: Partials, constants: dict[str, object]) -> None:
    tile = [constants["BLOCK_M"], constants["BLOCK_D"]]
    if list(partials.values.shape[1:]) != tile:
        raise ValueError(f"partials hold tiles of {list(partials.values.shape[1:])}; expected {tile}")


def _check_window(*, n_init: int, n_local: int) -> None:
    if not 0 <= n_init <= _INT32_MAX:
        raise ValueError(f"n_init {n_init} is outside 0-{_INT32_MAX}")
    if not 1 <= n_local <= _INT32_MAX:
        raise ValueError(f"n_local {n_local} is outside 1-{_INT32_MAX}; the window counts the query itself")
