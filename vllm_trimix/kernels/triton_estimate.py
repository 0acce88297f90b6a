"""Column and diagonal sums of the last queries' attention on CUDA: the estimate of vertical-slash patterns.

With A the causal softmax of the last R query rows over all keys of one request, the columns are the sums of A over its
rows, and the slashes those along its diagonals, by ``i - j`` (MInference, https://arxiv.org/abs/2407.02490, section 3).

Two passes, so that A is never stored: the rows' maxima and sums, by parts of the keys; then the products again, with
every weight known. A diagonal of as many rows as a block has keys crosses two neighbouring blocks. A program walks its
blocks in order and one more, and keeps what a block leaves to its neighbour, so that each sum is written once, by one
program, in one order: no atomics, and the same bits every time.
"""

import torch
import triton
import triton.language as tl

from vllm_trimix.kernels.triton_attention import key_rows, load_rows, mask_of, scores_of
from vllm_trimix.kernels.triton_configs import TileConfig, estimate_config_for, padded_tile
from vllm_trimix.kernels.triton_launch import (
    QUERY_DTYPES,
    LaunchVariant,
    TensorKinds,
    cache_constants,
    capability_for,
    check_devices,
    check_keys,
    check_logits,
    check_scales,
    check_table,
)

MAX_ROWS = 128
# Keys that a program walks: enough programs for the device at every length worth estimating.
_PART_KEYS = 1024

# As of ``triton_sparse``: another value must never compile another kernel.
_PER_REQUEST = [
    "request",
    "num_rows",
    "num_keys",
    "num_heads",
    "num_groups",
    "first_head",
    "group",
    "stride_q_head",
    "stride_q_row",
    "stride_table",
    "stride_stat_head",
    "stride_stat_part",
    "stride_sum_head",
    "stride_sum_group",
]
_PER_REQUEST_POINTERS = ["q_ptr", "block_table_ptr", "max_ptr", "sum_ptr", "columns_ptr", "slashes_ptr"]


@triton.jit
def _block_logits(
    q,
    k_ptr,
    pages_ptr,
    block,
    num_keys,
    first_position,
    exponent_scale,
    PAGE_SIZE: tl.constexpr,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCORE_DTYPE: tl.constexpr,
):
    """[BLOCK_N, BLOCK_N] causal logits of a block of keys, in units of log2."""
    keys = block * BLOCK_N + tl.arange(0, BLOCK_N)
    is_read = (keys >= 0) & (keys < num_keys)
    rows = key_rows(pages_ptr, keys, is_read, PAGE_SIZE, STRIDE_PAGE, STRIDE_TOKEN)
    k = load_rows(k_ptr, rows, is_read, tl.arange(0, BLOCK_D), HEAD_SIZE, BLOCK_D)
    position = first_position + tl.arange(0, BLOCK_N)
    visible = is_read[None, :] & (keys[None, :] <= position[:, None])
    return tl.where(visible, scores_of(q, k, SCORE_DTYPE) * exponent_scale, float("-inf"))


@triton.jit(do_not_specialize=_PER_REQUEST, do_not_specialize_on_alignment=_PER_REQUEST_POINTERS)
def estimate_kernel(
    q_ptr,
    k_ptr,
    block_table_ptr,
    max_ptr,
    sum_ptr,
    columns_ptr,
    slashes_ptr,
    q_scale_ptr,
    k_scale_ptr,
    scale,
    request,
    num_rows,
    num_keys,
    num_heads,
    num_groups,
    first_head,
    group,
    stride_q_head,
    stride_q_row,
    stride_table,
    stride_stat_head,
    stride_stat_part,
    stride_sum_head,
    stride_sum_group,
    STRIDE_PAGE: tl.constexpr,
    STRIDE_HEAD: tl.constexpr,
    STRIDE_TOKEN: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCKS: tl.constexpr,
    SCORE_DTYPE: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    IS_STATS: tl.constexpr,
):
    """Program i: head ``i % num_heads``, then a group of BLOCK_N rows, then BLOCKS blocks of keys.

    With IS_STATS maxima and sums of the rows over them; without, by all parts' statistics, their columns and slashes.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    slab_head = (tl.program_id(0) % num_heads).to(tl.int64)
    row_group = tl.program_id(0) // num_heads % num_groups
    part = tl.program_id(0) // num_heads // num_groups
    pages_ptr = block_table_ptr + tl.cast(request, tl.int64) * stride_table
    k_ptr += (first_head + slab_head) // group * STRIDE_HEAD
    offs_r = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    row = row_group * BLOCK_N + offs_r
    is_row = row < num_rows
    row_mask = mask_of(is_row, offs_d, HEAD_SIZE, BLOCK_D)
    q_rows = slab_head * stride_q_head + row.to(tl.int64) * stride_q_row
    q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=row_mask, other=0.0).to(SCORE_DTYPE)
    first_position = num_keys - num_rows + row_group * BLOCK_N
    exponent_scale = scale * LOG2E
    if HAS_Q_SCALE:
        exponent_scale *= tl.load(q_scale_ptr)
    if HAS_K_SCALE:
        exponent_scale *= tl.load(k_scale_ptr)
    num_blocks = (num_keys + BLOCK_N - 1) // BLOCK_N
    first_block = part * BLOCKS
    end_block = tl.minimum(first_block + BLOCKS, num_blocks)

    if IS_STATS:
        stat = slab_head * stride_stat_head + tl.cast(part, tl.int64) * stride_stat_part + row
        # The lowest finite fp32, not -inf: a row that sees none of the part's keys gives exp2(-inf), never -inf + inf.
        row_max = tl.full([BLOCK_N], -3.4028234663852886e38, dtype=tl.float32)
        row_sum = tl.zeros([BLOCK_N], dtype=tl.float32)
        for block in tl.range(first_block, end_block):
            logits = _block_logits(
                q, k_ptr, pages_ptr, block, num_keys, first_position, exponent_scale,
                PAGE_SIZE, STRIDE_PAGE, STRIDE_TOKEN, HEAD_SIZE, BLOCK_D, BLOCK_N, SCORE_DTYPE,
            )  # fmt: skip
            new_max = tl.maximum(row_max, tl.max(logits, 1))
            row_sum = row_sum * tl.exp2(row_max - new_max) + tl.sum(tl.exp2(logits - new_max[:, None]), 1)
            row_max = new_max
        tl.store(max_ptr + stat, row_max)
        tl.store(sum_ptr + stat, row_sum)
    else:
        stat = slab_head * stride_stat_head + row
        row_max = tl.load(max_ptr + stat)
        row_weight = tl.where(is_row, 1.0 / tl.load(sum_ptr + stat), 0.0)
        sums = slab_head * stride_sum_head + tl.cast(row_group, tl.int64) * stride_sum_group
        offs_n = tl.arange(0, BLOCK_N)
        # Entry w of a row, turned by its number, lies on the block's diagonal w or, beyond the turn, w - BLOCK_N.
        turned = (offs_n[None, :] + offs_r[:, None]) % BLOCK_N
        is_own = offs_n[None, :] + offs_r[:, None] < BLOCK_N
        kept = tl.zeros([BLOCK_N], dtype=tl.float32)
        for block in tl.range(first_block, end_block + 1):
            logits = _block_logits(
                q, k_ptr, pages_ptr, block, num_keys, first_position, exponent_scale,
                PAGE_SIZE, STRIDE_PAGE, STRIDE_TOKEN, HEAD_SIZE, BLOCK_D, BLOCK_N, SCORE_DTYPE,
            )  # fmt: skip
            weights = tl.exp2(logits - row_max[:, None]) * row_weight[:, None]
            keys = block * BLOCK_N + offs_n
            is_mine = (keys < num_keys) & (block < end_block)
            tl.store(columns_ptr + sums + keys, tl.sum(weights, 0), mask=is_mine)
            sheared = tl.gather(weights, turned, 1)
            left = tl.sum(tl.where(is_own, 0.0, sheared), 0)
            # Diagonal u = j - r: this block's rows end what the block before it began.
            offset = first_position - (keys - BLOCK_N)
            is_done = (offset >= 0) & (offset < num_keys) & ((block > first_block) | (block == 0))
            tl.store(slashes_ptr + sums + offset, kept + left, mask=is_done)
            kept = tl.sum(tl.where(is_own, sheared, 0.0), 0)


def column_and_slash_sums(
    q_last: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    *,
    request: int,
    num_keys: int,
    first_head: int,
    group: int,
    scale: float,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums of the last rows' attention by key and by distance, over one request's paged keys.

    Launches two kernels and some small operations, and never waits for the device.

    Args:
        q_last: Queries of the last positions, [num_heads, num_rows, head_size], at most 128 rows, last dim contiguous;
            bf16/fp16/fp32/fp8_e4m3.
        k_cache: Keys, [num_pages, num_kv_heads, page_size, head_size], any strides with a contiguous last dim; the
            dtype of ``q_last``, or fp8.
        block_table: Pages of each request, [num_requests, max_pages], int32.
        request: Row of ``block_table``.
        num_keys: Keys, the last row's own among them.
        first_head: Query head, on this device, of ``q_last[0]``.
        group: Query heads of a KV head.
        scale: Softmax scale, from the true head size.
        q_scale: Dequantisation scale of fp8 queries, one fp32 on the device; None is 1.
        k_scale: Dequantisation scale of fp8 keys, like ``q_scale``.

    Returns:
        Columns and slashes, fp32 [num_heads, num_keys]: the sums of ``A[:, j]`` over the rows, by key j, and those of
        ``A[i, i - o]``, by distance o.

    Raises:
        ValueError: A shape, dtype, stride or parameter is outside what the kernel takes.
    """
    num_heads, num_rows, head_size = _check(q_last, k_cache, block_table, request, num_keys, (first_head, group))
    check_logits(scale=scale, soft_cap=0.0)
    check_scales(q_last.device, q_scale=q_scale, k_scale=k_scale)
    capability_for(q_last.dtype, k_cache.dtype, q_last.device)
    config = estimate_config_for(head_size, q_last.element_size())
    num_groups = -(-num_rows // config.block_m)
    num_parts = -(-num_keys // _PART_KEYS)
    stats = q_last.new_empty(2, num_heads, num_parts, num_groups * config.block_m, dtype=torch.float32)
    # Zeros: a group's rows reach only a part of the distances.
    columns, slashes = q_last.new_zeros(2, num_heads, num_groups, num_keys, dtype=torch.float32)
    kinds = TensorKinds(
        q_dtype=q_last.dtype,
        cache_dtype=k_cache.dtype,
        num_heads=group * k_cache.shape[1],
        num_kv_heads=k_cache.shape[1],
        head_size=head_size,
        page_size=k_cache.shape[2],
        cache_stride=k_cache.stride()[:3],
        has_q_scale=q_scale is not None,
        has_k_scale=k_scale is not None,
    )
    variant = LaunchVariant.of(config, estimate_constants(config, kinds))

    def launch(maxima: torch.Tensor, sums: torch.Tensor, *, is_stats: bool) -> None:
        estimate_kernel[(num_heads * num_groups * num_parts,)](
            q_last,
            k_cache,
            block_table,
            maxima,
            sums,
            columns,
            slashes,
            q_scale,
            k_scale,
            float(scale),
            request,
            num_rows,
            num_keys,
            num_heads,
            num_groups,
            first_head,
            group,
            q_last.stride(0),
            q_last.stride(1),
            block_table.stride(0),
            maxima.stride(0),
            maxima.stride(1),
            columns.stride(0),
            columns.stride(1),
            **variant.constants,
            IS_STATS=is_stats,
            **variant.options,
        )

    maxima, sums = stats
    launch(maxima, sums, is_stats=True)
    highest = maxima.amax(1, keepdim=True)
    launch(highest, (sums * torch.exp2(maxima - highest)).sum(1, keepdim=True), is_stats=False)
    if num_groups == 1:
        return columns[:, 0], slashes[:, 0]
    return columns.sum(1), slashes.sum(1)


def pool(sums: torch.Tensor, block_size: int) -> torch.Tensor:
    """Sums of whole blocks of ``block_size`` keys, [num_heads, num_blocks], of those by key."""
    num_heads, num_keys = sums.shape
    padded = torch.nn.functional.pad(sums, (0, -num_keys % block_size))
    return padded.view(num_heads, -1, block_size).sum(-1)


def estimate_constants(config: TileConfig, kinds: TensorKinds) -> dict[str, object]:
    """Compile-time arguments of the kernel but IS_STATS; it reads no values and knows no cap."""
    return {
        **cache_constants(kinds),
        "BLOCK_N": config.block_n,
        "BLOCK_D": padded_tile(1, 1, kinds.head_size)[1],
        "BLOCKS": _PART_KEYS // config.block_n,
    }


def _check(
    q_last: torch.Tensor,
    k_cache: torch.Tensor,
    block_table: torch.Tensor,
    request: int,
    num_keys: int,
    heads: tuple[int, int],
) -> torch.Size:
    if q_last.ndim != 3 or q_last.dtype not in QUERY_DTYPES or not 1 <= q_last.shape[1] <= MAX_ROWS:
        raise ValueError(
            f"q_last is {q_last.dtype} {list(q_last.shape)}; expected [num_heads, 1 to {MAX_ROWS}, head_size] "
            f"in {QUERY_DTYPES}"
        )
    num_heads, num_rows, head_size = q_last.shape
    check_keys(k_cache, q_last.dtype, head_size)
    for name, tensor in (("q_last", q_last), ("k_cache", k_cache)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} has stride {tensor.stride(-1)}; expected 1")
    check_table("block_table", block_table)
    check_devices(q_last.device, k_cache=k_cache, block_table=block_table)
    if not 0 <= request < block_table.shape[0]:
        raise ValueError(f"request {request} is outside the {block_table.shape[0]} rows of block_table")
    limit = block_table.shape[1] * k_cache.shape[2]
    if not num_rows <= num_keys <= limit:
        raise ValueError(f"num_keys {num_keys} is outside {num_rows} to {limit}: the rows, and the table's pages")
    first_head, group = heads
    if group < 1 or first_head < 0 or first_head + num_heads > group * k_cache.shape[1]:
        raise ValueError(
            f"heads {first_head} to {first_head + num_heads - 1} are outside {k_cache.shape[1]} KV heads of {group}"
        )
    return q_last.shape
