"""Sparse prefill on CUDA: listed blocks and single columns of keys, paged, in one online softmax.

A program owns a tile of query rows, or a part of one where the launch shape is smaller, and one query head: a selection
is per head, so that heads of a KV head share nothing but the cache. It walks one list of steps of ``BLOCK_N`` keys: the
tile's columns, its blocks, and last the tile's own block, where alone causality hides keys. Columns are gathered: a key
costs one lookup of its page whether it is one of a block or alone, so that both are one loop.

What it reads is a ``SparseIndex`` (``sparse_index``); ``torch_sparse`` is the same in plain PyTorch.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vllm_trimix.kernels.sparse_index import SparseIndex
from vllm_trimix.kernels.triton_attention import (
    accumulate,
    cap_scores,
    check_devices,
    check_fp8,
    check_logits,
    check_queries_and_cache,
    check_scales,
    check_table,
    key_rows,
    load_rows,
    matrix_dtypes,
    scores_of,
)
from vllm_trimix.kernels.triton_configs import (
    TileConfig,
    capability_of,
    group_size,
    padded_tile,
    sparse_config_for,
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
    LOG2E: tl.constexpr = 1.4426950408889634
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
    row_mask = ((rows_position >= begin) & (rows_position < end))[:, None]
    if HEAD_SIZE != BLOCK_D:
        row_mask = row_mask & (offs_d < HEAD_SIZE)[None, :]
    token = tl.cast(first_row, tl.int64) + (rows_position - position)
    q_rows = token * stride_q_token + head * stride_q_head
    q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=row_mask, other=0.0).to(SCORE_DTYPE)

    logit_scale = scale
    if HAS_Q_SCALE:
        logit_scale *= tl.load(q_scale_ptr)
    if HAS_K_SCALE:
        logit_scale *= tl.load(k_scale_ptr)
    exponent_scale = (soft_cap if HAS_SOFT_CAP else logit_scale) * LOG2E

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    # The lowest finite fp32, not -inf: a step that hides every key of a row must give exp2(-inf), never -inf + inf.
    row_max = tl.full([BLOCK_M], -3.4028234663852886e38, dtype=tl.float32)
    row_sum = tl.zeros([BLOCK_M], dtype=tl.float32)
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

    result = acc / row_sum[:, None]
    if HAS_V_SCALE:
        result *= tl.load(v_scale_ptr)
    out_rows = token * stride_out_token + head * stride_out_head
    tl.store(out_ptr + out_rows[:, None] + offs_d[None, :], result.to(out_ptr.dtype.element_ty), mask=row_mask)
    # Of a tile's parts the last one reads what all read.
    is_last = has_rows & (end == tl.minimum(tile_start + BLOCK_ROWS, end_position))
    tl.store(keys_read_ptr + wide_head * stride_read_head + tile, keys_read, mask=is_last)


class SparseVariant(NamedTuple):
    """What a call needs to know of the kinds of its tensors, found and checked once.

    Attributes:
        config: Launch shape.
        constants: Compile-time arguments.
    """

    config: TileConfig
    constants: dict[str, object]


def sparse_constants(
    config: TileConfig,
    *,
    q_dtype: torch.dtype,
    cache_dtype: torch.dtype,
    group: int,
    head_size: int,
    page_size: int,
    cache_stride: tuple[int, ...],
    block_size: int,
    has_columns: bool,
    has_band: bool,
    has_soft_cap: bool = False,
    has_q_scale: bool = False,
    has_k_scale: bool = False,
    has_v_scale: bool = False,
) -> dict[str, object]:
    """Compile-time arguments of the kernel: what a variant is keyed on. No length is among them.

    Args:
        config: Launch shape, of ``sparse_config_for``.
        q_dtype: Dtype of the queries.
        cache_dtype: Dtype of the cache.
        group: Query heads of a KV head.
        head_size: True head size.
        page_size: Tokens of a page.
        cache_stride: Strides of page, head and token in the cache, in elements.
        block_size: Rows of a tile, and keys of a block, of the index.
        has_columns: Whether the index lists columns.
        has_band: Whether it has a band.
        has_soft_cap: Whether logits are capped.
        has_q_scale: Whether the queries have a dequantisation scale.
        has_k_scale: Whether the keys have a dequantisation scale.
        has_v_scale: Whether the values have a dequantisation scale.
    """
    return {
        "STRIDE_PAGE": cache_stride[0],
        "STRIDE_HEAD": cache_stride[1],
        "STRIDE_TOKEN": cache_stride[2],
        "GROUP": group,
        "PAGE_SIZE": page_size,
        "HEAD_SIZE": head_size,
        "BLOCK_ROWS": block_size,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "BLOCK_D": padded_tile(1, 1, head_size)[1],
        "LOOKAHEAD": config.lookahead,
        **matrix_dtypes(q_dtype, cache_dtype),
        "HAS_COLUMNS": has_columns,
        "HAS_BAND": has_band,
        "HAS_SOFT_CAP": has_soft_cap,
        "HAS_Q_SCALE": has_q_scale,
        "HAS_K_SCALE": has_k_scale,
        "HAS_V_SCALE": has_v_scale,
    }


def sparse_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    index: SparseIndex,
    *,
    request: int,
    first_row: int,
    first_head: int,
    scale: float,
    out: torch.Tensor,
    keys_read: torch.Tensor,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    soft_cap: float = 0.0,
    variant: SparseVariant | None = None,
) -> SparseVariant:
    """Attention of one request's rows and a slab of its heads over the listed keys, written to ``out`` in place.

    Rows and heads outside stay as they are. The call launches one kernel and never waits for the device.

    Args:
        q: Queries of the step, [num_tokens, num_heads, head_size], bf16/fp16/fp32/fp8_e4m3, last dim contiguous.
        k_cache: Keys, [num_pages, num_kv_heads, page_size, head_size], any strides with a contiguous last dim; the
            dtype of ``q``, or fp8 (e4m3 or e5m2).
        v_cache: Values, with the strides and dtype of ``k_cache``.
        block_table: Pages of each request, [num_requests, max_pages], int32.
        index: What each tile of each head of the slab reads, on the device; ``idle_index`` has no rows.
        request: Row of ``block_table``.
        first_row: Row of ``q`` where the index's rows start.
        first_head: Query head, on this device, where the slab starts.
        scale: Softmax scale, from the true head size.
        out: Output, shape of ``q``, bf16/fp16/fp32, last dim contiguous.
        keys_read: Keys loaded for each tile, int32 [slab heads, num_tiles], last dim contiguous, written.
        q_scale: Dequantisation scale of an fp8 ``q``, one fp32 on the device; None is 1.
        k_scale: Dequantisation scale of fp8 keys, like ``q_scale``.
        v_scale: Dequantisation scale of fp8 values, like ``q_scale``.
        soft_cap: Logits become ``soft_cap * tanh(logit / soft_cap)``; 0 is off.
        variant: From an earlier call with tensors of the same kinds: dtypes and strides are not checked again.

    Returns:
        The variant, for further calls.

    Raises:
        ValueError: A shape, dtype, stride or parameter is outside what the kernel takes.
    """
    tiles, counts, columns = index.tiles, index.block_count, index.column_index
    if variant is None:
        check_queries_and_cache(q, k_cache, v_cache, out)
        _check_index(index, q.device)
        check_table("block_table", block_table)
        check_devices(q.device, block_table=block_table)
        check_logits(scale=scale, soft_cap=soft_cap)
        check_scales(q.device, q_scale=q_scale, k_scale=k_scale, v_scale=v_scale)
        variant = _find_variant(
            q,
            k_cache,
            block_size=tiles.block_size,
            has_columns=columns is not None,
            has_band=index.band is not None,
            has_soft_cap=soft_cap > 0,
            has_q_scale=q_scale is not None,
            has_k_scale=k_scale is not None,
            has_v_scale=v_scale is not None,
        )
    num_heads, num_tiles = counts.shape
    _check_places(q, block_table, tiles, request=request, first_row=first_row, heads=(first_head, num_heads))
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
        q_scale,
        k_scale,
        v_scale,
        float(scale),
        float(soft_cap),
        request,
        first_row,
        first_head,
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
        num_warps=variant.config.num_warps,
        num_stages=variant.config.num_stages,
        maxnreg=variant.config.max_registers,
        enable_fp_fusion=True,
    )
    return variant


def idle_index(block_size: int, device: torch.device, *, has_columns: bool, has_band: bool) -> SparseIndex:
    """An index of one head without rows: a launch that compiles what serving will launch, and writes nothing.

    Args:
        block_size: Rows of a tile of the indices to come.
        device: Where they will be.
        has_columns: Whether they will list columns.
        has_band: Whether they will have a band.
    """
    zeros = torch.zeros(1, 1, 2, dtype=torch.int32, device=device)
    return SparseIndex(
        tiles=Tiles(block_size, 0, 0),
        block_count=zeros[..., 0],
        block_index=zeros,
        column_count=zeros[..., 0] if has_columns else None,
        column_index=zeros if has_columns else None,
        band=zeros[0] if has_band else None,
    )


def _find_variant(q: torch.Tensor, k_cache: torch.Tensor, *, block_size: int, **flags: bool) -> SparseVariant:
    _, num_heads, head_size = q.shape
    num_kv_heads, page_size = k_cache.shape[1:3]
    capability = capability_of(q.device)
    check_fp8(q.dtype, k_cache.dtype, capability)
    config = sparse_config_for(head_size, q.element_size(), k_cache.element_size(), block_size, capability)
    constants = sparse_constants(
        config,
        q_dtype=q.dtype,
        cache_dtype=k_cache.dtype,
        group=group_size(num_heads, num_kv_heads),
        head_size=head_size,
        page_size=page_size,
        cache_stride=k_cache.stride()[:3],
        block_size=block_size,
        **flags,
    )
    return SparseVariant(config, constants)


def _check_places(
    q: torch.Tensor,
    block_table: torch.Tensor,
    tiles: Tiles,
    *,
    request: int,
    first_row: int,
    heads: tuple[int, int],
) -> None:
    if not 0 <= request < block_table.shape[0]:
        raise ValueError(f"request {request} is outside the {block_table.shape[0]} rows of block_table")
    for name, first, count, limit in (
        ("rows", first_row, tiles.num_rows, q.shape[0]),
        ("heads", *heads, q.shape[1]),
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
