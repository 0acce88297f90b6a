"""Sparse prefill on CUDA: listed blocks and single columns of keys, paged, in one online softmax.

A program owns a tile of query rows, or a part of one where the launch shape is smaller, and one query head: a selection
is per head, so that heads of a KV head share nothing but the cache. It walks one list of steps of ``BLOCK_N`` keys: the
tile's columns, its blocks, and last the tile's own block, where alone causality hides keys. Columns are gathered: a key
costs one lookup of its page whether it is one of a block or alone, so that both are one loop.

What it reads is a ``SparseIndex`` (``sparse_index``); ``torch_sparse`` is the same in plain PyTorch.
"""

import torch
import triton
import triton.language as tl

from vllm_trimix.kernels.layer_call import LayerCall
from vllm_trimix.kernels.sparse_index import Place, SparseIndex
from vllm_trimix.kernels.triton_attention import (
    accumulate,
    after_all_keys,
    before_any_key,
    cap_scores,
    key_rows,
    load_rows,
    logit_scales,
    mask_of,
    scores_of,
    store_rows,
)
from vllm_trimix.kernels.triton_configs import TileConfig, padded_tile, sparse_config_for
from vllm_trimix.kernels.triton_launch import (
    LaunchVariant,
    TensorKinds,
    attention_constants,
    capability_for,
    check_call,
    check_devices,
    check_table,
)
from vllm_trimix.patterns.selection import Tiles

BLOCK_SIZES = (64, 128)

# A request's numbers and an index's shape: another value must never compile another kernel.
_PER_REQUEST = [
    "request",
    "first_row",
    "first_head",
    "position",
    "num_rows",
    "num_heads",
    "num_tiles",
    "stride_table",
    "stride_block_head",
    "stride_block_tile",
    "stride_column_head",
    "stride_column_tile",
    "stride_read_head",
]
# Slices of larger tensors: their alignment differs from call to call.
_PER_REQUEST_POINTERS = [
    "block_table_ptr",
    "block_count_ptr",
    "block_index_ptr",
    "column_count_ptr",
    "column_index_ptr",
    "band_ptr",
    "keys_read_ptr",
]


@triton.jit
def _step_keys(
    step,
    num_steps,
    column_steps,
    num_columns,
    end,
    blocks_ptr,
    columns_ptr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
):
    """A step's first key, -1 where it is of columns, how many of its BLOCK_N keys are read, and their positions."""
    STEPS: tl.constexpr = BLOCK_ROWS // BLOCK_N
    offs_n = tl.arange(0, BLOCK_N)
    is_block = (step >= column_steps) & (step < num_steps)
    at = step - column_steps
    block = tl.load(blocks_ptr + at // STEPS, mask=is_block, other=0)
    first_key = block * BLOCK_ROWS + at % STEPS * BLOCK_N
    limit = tl.where(is_block, end - first_key, 0)
    keys = first_key + offs_n
    if HAS_COLUMNS:
        is_column = step < column_steps
        first_key = tl.where(is_column, -1, first_key)
        limit = tl.where(is_column, num_columns - step * BLOCK_N, limit)
        columns = tl.load(columns_ptr + step * BLOCK_N + offs_n, mask=is_column & (offs_n < limit), other=0)
        keys = tl.where(is_column, columns, keys)
    return first_key, limit, keys


@triton.jit(do_not_specialize=_PER_REQUEST, do_not_specialize_on_alignment=_PER_REQUEST_POINTERS)
def sparse_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    block_table_ptr,
    block_count_ptr,
    block_index_ptr,
    column_count_ptr,
    column_index_ptr,
    band_ptr,
    keys_read_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    scale,
    soft_cap,
    request,
    first_row,
    first_head,
    position,
    num_rows,
    num_heads,
    num_tiles,
    stride_q_token,
    stride_q_head,
    stride_out_token,
    stride_out_head,
    stride_table,
    stride_block_head,
    stride_block_tile,
    stride_column_head,
    stride_column_tile,
    stride_read_head,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOOKAHEAD: tl.constexpr,
    SCORE_DTYPE: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    HAS_BAND: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
):
    """Program i: head ``i % num_heads`` of the slab; then go a tile's parts, and slowest the tiles, last first."""
    INT32_MAX: tl.constexpr = 2147483647
    PARTS: tl.constexpr = BLOCK_ROWS // BLOCK_M
    STEPS: tl.constexpr = BLOCK_ROWS // BLOCK_N
    # Heads of a KV head run beside each other and find each other's keys in the cache; the longest tiles start first.
    slab_head = tl.program_id(0) % num_heads
    tile_part = tl.program_id(0) // num_heads
    tile = num_tiles - 1 - tile_part // PARTS
    tile_start = (position // BLOCK_ROWS + tile) * BLOCK_ROWS
    part_start = tile_start + tile_part % PARTS * BLOCK_M
    end_position = position + num_rows
    begin = tl.maximum(part_start, position)
    end = tl.minimum(part_start + BLOCK_M, end_position)

    wide_head = slab_head.to(tl.int64)
    count_at = wide_head * num_tiles + tile
    blocks_ptr = block_index_ptr + wide_head * stride_block_head + tl.cast(tile, tl.int64) * stride_block_tile
    num_blocks = tl.load(block_count_ptr + count_at)
    columns_ptr = blocks_ptr
    num_columns = 0
    if HAS_COLUMNS:
        columns_ptr = column_index_ptr + wide_head * stride_column_head + tl.cast(tile, tl.int64) * stride_column_tile
        num_columns = tl.load(column_count_ptr + count_at)
    # A part without rows, of a request's first or last tile, does nothing.
    has_rows = begin < end
    column_steps = tl.where(has_rows, (num_columns + BLOCK_N - 1) // BLOCK_N, 0)
    full_steps = column_steps + (num_blocks - 1) * STEPS
    num_steps = tl.where(has_rows, full_steps + (end - tile_start + BLOCK_N - 1) // BLOCK_N, 0)
    n_init, n_local = 0, 0
    if HAS_BAND:
        n_init = tl.load(band_ptr + wide_head * 2)
        n_local = tl.load(band_ptr + wide_head * 2 + 1)

    head = first_head + wide_head
    pages_ptr = block_table_ptr + tl.cast(request, tl.int64) * stride_table
    k_ptr += head // GROUP * STRIDE_HEAD
    v_ptr += head // GROUP * STRIDE_HEAD
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = tl.arange(0, BLOCK_N)
    rows_position = part_start + tl.arange(0, BLOCK_M)
    row_mask = mask_of((rows_position >= begin) & (rows_position < end), offs_d, HEAD_SIZE, BLOCK_D)
    token = tl.cast(first_row, tl.int64) + (rows_position - position)
    q_rows = token * stride_q_token + head * stride_q_head
    q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=row_mask, other=0.0).to(SCORE_DTYPE)

    logit_scale, exponent_scale = logit_scales(
        scale, soft_cap, q_scale_ptr, k_scale_ptr, HAS_SOFT_CAP, HAS_Q_SCALE, HAS_K_SCALE
    )
    acc, row_max, row_sum = before_any_key(BLOCK_M, BLOCK_D)
    keys_read = 0

    next_first, next_limit, keys = _step_keys(
        0, num_steps, column_steps, num_columns, end, blocks_ptr, columns_ptr, BLOCK_ROWS, BLOCK_N, HAS_COLUMNS
    )
    next_rows = key_rows(pages_ptr, keys, offs_n < next_limit, PAGE_SIZE, STRIDE_PAGE, STRIDE_TOKEN)
    next_scores = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    if LOOKAHEAD:
        k = load_rows(k_ptr, next_rows, offs_n < next_limit, offs_d, HEAD_SIZE, BLOCK_D)
        next_scores = scores_of(q, k, SCORE_DTYPE)

    for step in tl.range(0, num_steps):
        first_key, limit, rows = next_first, next_limit, next_rows
        next_first, next_limit, keys = _step_keys(
            step + 1, num_steps, column_steps, num_columns, end, blocks_ptr, columns_ptr,
            BLOCK_ROWS, BLOCK_N, HAS_COLUMNS,
        )  # fmt: skip
        next_rows = key_rows(pages_ptr, keys, offs_n < next_limit, PAGE_SIZE, STRIDE_PAGE, STRIDE_TOKEN)
        v = load_rows(v_ptr, rows, offs_n < limit, offs_d, HEAD_SIZE, BLOCK_D)
        if LOOKAHEAD:
            k = load_rows(k_ptr, next_rows, offs_n < next_limit, offs_d, HEAD_SIZE, BLOCK_D)
            scores = next_scores
            next_scores = scores_of(q, k, SCORE_DTYPE)
        else:
            k = load_rows(k_ptr, rows, offs_n < limit, offs_d, HEAD_SIZE, BLOCK_D)
            scores = scores_of(q, k, SCORE_DTYPE)
        keys_read += tl.minimum(limit, BLOCK_N)
        if HAS_SOFT_CAP:
            scores = cap_scores(scores, logit_scale, soft_cap)
        # Columns that aren't there, the future, and what the band hides; any other step is seen whole.
        is_edge = (limit < BLOCK_N) | (step >= full_steps)
        if HAS_BAND:
            is_edge = is_edge | ((first_key > n_init - BLOCK_N) & (end - 1 - first_key >= n_local) & (first_key >= 0))
        if is_edge:
            shown = tl.where(first_key < 0, tl.where(offs_n < limit, -1, INT32_MAX), first_key + offs_n)[None, :]
            visible = shown <= rows_position[:, None]
            if HAS_BAND:
                visible = visible & ((shown < n_init) | (rows_position[:, None] - shown < n_local))
            scores = tl.where(visible, scores, float("-inf"))
        acc, row_max, row_sum = accumulate(acc, row_max, row_sum, scores, v, exponent_scale, COMPUTE_DTYPE)

    result = after_all_keys(acc, row_sum, v_scale_ptr, HAS_V_SCALE)
    out_rows = token * stride_out_token + head * stride_out_head
    store_rows(out_ptr, out_rows, offs_d, row_mask, result)
    # Of a tile's parts the last one reads what all read.
    is_last = has_rows & (end == tl.minimum(tile_start + BLOCK_ROWS, end_position))
    tl.store(keys_read_ptr + wide_head * stride_read_head + tile, keys_read, mask=is_last)


def sparse_constants(
    config: TileConfig, kinds: TensorKinds, *, block_size: int, has_columns: bool, has_band: bool
) -> dict[str, object]:
    """Compile-time arguments of the kernel: what a variant is keyed on. No length is among them.

    Args:
        config: Launch shape, of ``sparse_config_for``.
        kinds: Of the layer's tensors.
        block_size: Rows of a tile, and keys of a block, of the index.
        has_columns: Whether the index lists columns.
        has_band: Whether it has a band.
    """
    return {
        **attention_constants(config, kinds),
        "BLOCK_ROWS": block_size,
        "BLOCK_M": config.block_m,
        "BLOCK_D": padded_tile(1, 1, kinds.head_size)[1],
        "HAS_COLUMNS": has_columns,
        "HAS_BAND": has_band,
    }


def sparse_prefill(
    call: LayerCall,
    block_table: torch.Tensor,
    index: SparseIndex,
    place: Place,
    *,
    keys_read: torch.Tensor,
    variant: LaunchVariant | None = None,
) -> LaunchVariant:
    """Attention of one request's rows and a slab of its heads over the listed keys, written to ``call.out`` in place.

    Rows and heads outside stay as they are. The call launches one kernel and never waits for the device.

    Args:
        call: The layer's tensors.
        block_table: Pages of each request, [num_requests, max_pages], int32.
        index: What each tile of each head of the slab reads, on the device; ``idle_index`` has no rows.
        place: Where the slab lies in the step.
        keys_read: Keys loaded for each tile, int32 [slab heads, num_tiles], last dim contiguous, written.
        variant: From an earlier call with tensors of the same kinds: dtypes and strides are not checked again.

    Returns:
        The variant, for further calls.

    Raises:
        ValueError: A shape, dtype, stride or parameter is outside what the kernel takes.
    """
    q, k_cache, v_cache, out, scale, soft_cap, scales = call
    tiles, counts, columns = index.tiles, index.block_count, index.column_index
    if variant is None:
        check_call(call, block_table)
        _check_index(index, q.device)
        variant = _find_variant(call, index)
    num_heads, num_tiles = counts.shape
    _check_place(q, block_table, tiles, place, num_heads)
    if keys_read.shape != counts.shape or keys_read.dtype != torch.int32 or keys_read.stride(1) != 1:
        raise ValueError(f"keys_read is {keys_read.dtype} {list(keys_read.shape)}; expected int32 {list(counts.shape)}")
    parts = tiles.block_size // variant.config.block_m
    sparse_prefill_kernel[(num_heads * num_tiles * parts,)](
        q,
        k_cache,
        v_cache,
        out,
        block_table,
        counts,
        index.block_index,
        index.column_count,
        columns,
        index.band,
        keys_read,
        *scales,
        float(scale),
        float(soft_cap),
        *place,
        tiles.position,
        tiles.num_rows,
        num_heads,
        num_tiles,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        block_table.stride(0),
        index.block_index.stride(0),
        index.block_index.stride(1),
        0 if columns is None else columns.stride(0),
        0 if columns is None else columns.stride(1),
        keys_read.stride(0),
        **variant.constants,
        **variant.options,
    )
    return variant


def _find_variant(call: LayerCall, index: SparseIndex) -> LaunchVariant:
    q, k_cache, block_size = call.q, call.k_cache, index.tiles.block_size
    kinds = TensorKinds.of(call)
    capability = capability_for(q.dtype, k_cache.dtype, q.device)
    config = sparse_config_for(kinds.head_size, q.element_size(), k_cache.element_size(), block_size, capability)
    constants = sparse_constants(
        config,
        kinds,
        block_size=block_size,
        has_columns=index.column_index is not None,
        has_band=index.band is not None,
    )
    return LaunchVariant.of(config, constants)


def _check_place(q: torch.Tensor, block_table: torch.Tensor, tiles: Tiles, place: Place, num_heads: int) -> None:
    if not 0 <= place.request < block_table.shape[0]:
        raise ValueError(f"request {place.request} is outside the {block_table.shape[0]} rows of block_table")
    for name, first, count, limit in (
        ("rows", place.first_row, tiles.num_rows, q.shape[0]),
        ("heads", place.first_head, num_heads, q.shape[1]),
    ):
        if first < 0 or first + count > limit:
            raise ValueError(f"{name} {first} to {first + count - 1} are outside the {limit} of q")


def _check_index(index: SparseIndex, device: torch.device) -> None:
    if index.tiles.block_size not in BLOCK_SIZES:
        raise ValueError(f"the index has blocks of {index.tiles.block_size}; expected one of {BLOCK_SIZES}")
    slab = list(index.block_count.shape)
    for name, tensor, dims in (
        ("block_count", index.block_count, 2),
        ("block_index", index.block_index, 3),
        ("column_count", index.column_count, 2),
        ("column_index", index.column_index, 3),
    ):
        if tensor is None:
            continue
        if tensor.dtype != torch.int32 or tensor.ndim != dims or list(tensor.shape[:2]) != slab:
            raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected int32 {slab}{'...'[: dims - 1]}")
        if (dims == 2 and not tensor.is_contiguous()) or (dims == 3 and tensor.stride(2) != 1):
            raise ValueError(f"{name} has strides {tensor.stride()}; expected its rows contiguous")
    if (index.column_count is None) != (index.column_index is None):
        raise ValueError("the index has one of column_count and column_index; expected both or none")
    if index.band is not None:
        check_table("band", index.band, 2)
        if index.band.shape[0] != slab[0]:
            raise ValueError(f"band has {index.band.shape[0]} rows; expected one for each of {slab[0]} heads")
    check_devices(
        device,
        block_count=index.block_count,
        block_index=index.block_index,
        column_count=index.column_count,
        column_index=index.column_index,
        band=index.band,
    )
