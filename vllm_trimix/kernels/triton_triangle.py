"""Triangle prefill of the band rows on CUDA: one paged, GQA-packed Triton kernel with one online softmax.

A program owns one query tile and one KV head. The tile packs ``tile_rows`` tokens times all query heads of the KV
head, so that every key and value is loaded once for the whole group. It first sees the sink keys that lie before the
tile's window, then the window itself; the two ranges are disjoint, so each key counts exactly once.

The rule is that of TriangleMix (https://arxiv.org/abs/2507.21526): the query at absolute position ``i`` sees key
``j <= i`` iff ``j < n_init`` or ``i - j < n_local``.
"""

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl

MAX_HEAD_SIZE = 256
_INT32_MAX = 2**31 - 1

_QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
_OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FP8_CACHE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
# Compute dtype of the two matrix products, by query dtype.
_COMPUTE_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.bfloat16,
}


@dataclass(frozen=True)
class TileConfig:
    """Launch shape of one kernel variant.

    Attributes:
        block_m: Query rows of a tile, tokens times the GQA group.
        block_n: Keys per step.
        num_warps: Warps per program.
        num_stages: Depth of the software pipeline over the keys.
    """

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# (padded head size, bytes of the compute dtype) -> launch shape. Small enough for the 99 KiB of shared memory of
# compute capability 8.6, 8.9 and 12.0. fp32 runs on FMA units: small tiles, no tensor cores.
_CONFIGS = {
    (64, 2): TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=2),
    (128, 2): TileConfig(block_m=128, block_n=64, num_warps=8, num_stages=2),
    (256, 2): TileConfig(block_m=64, block_n=32, num_warps=8, num_stages=2),
    (64, 4): TileConfig(block_m=32, block_n=32, num_warps=4, num_stages=2),
    (128, 4): TileConfig(block_m=32, block_n=32, num_warps=8, num_stages=2),
    (256, 4): TileConfig(block_m=16, block_n=16, num_warps=8, num_stages=2),
}
# Below compute capability 9.0 the matrix operands live in registers: these would spill with the key tile above.
_BLOCK_N_BEFORE_HOPPER = {(128, 2): 32}


@triton.jit
def triangle_prefill_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    block_table_ptr,
    tiles_ptr,
    q_scale_ptr,
    k_scale_ptr,
    v_scale_ptr,
    scale,
    soft_cap,
    n_init,
    n_local,
    stride_q_token,
    stride_q_head,
    stride_k_block,
    stride_k_head,
    stride_k_token,
    stride_v_block,
    stride_v_head,
    stride_v_token,
    stride_out_token,
    stride_out_head,
    stride_table,
    stride_tile,
    GROUP: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    COMPUTE_DTYPE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_Q_SCALE: tl.constexpr,
    HAS_K_SCALE: tl.constexpr,
    HAS_V_SCALE: tl.constexpr,
):
    """Program (t, h): the rows of tile t, for all query heads of KV head h."""
    LOG2E: tl.constexpr = 1.4426950408889634
    kv_head = tl.program_id(1).to(tl.int64)
    tile_ptr = tiles_ptr + tl.program_id(0).to(tl.int64) * stride_tile
    pages_ptr = block_table_ptr + tl.load(tile_ptr).to(tl.int64) * stride_table
    first_token = tl.load(tile_ptr + 1).to(tl.int64)
    num_tokens = tl.load(tile_ptr + 2)
    first_position = tl.load(tile_ptr + 3)
    last_position = first_position + num_tokens - 1

    offs_m = tl.arange(0, BLOCK_M)
    offs_n = tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    row = offs_m // GROUP
    token = first_token + row
    head = kv_head * GROUP + offs_m % GROUP
    position = (first_position + row)[:, None]
    row_mask = (row < num_tokens)[:, None]
    if HEAD_SIZE != BLOCK_D:
        row_mask = row_mask & (offs_d < HEAD_SIZE)[None, :]
    q_rows = token * stride_q_token + head * stride_q_head
    q = tl.load(q_ptr + q_rows[:, None] + offs_d[None, :], mask=row_mask, other=0.0).to(COMPUTE_DTYPE)
    k_ptr += kv_head * stride_k_head
    v_ptr += kv_head * stride_v_head

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

    # Steps start at multiples of BLOCK_N: then a page that holds whole steps costs one table lookup a step.
    window_start = tl.maximum(first_position - n_local + 1, 0)
    first_step = window_start // BLOCK_N * BLOCK_N
    num_sinks = tl.minimum(n_init, first_step)
    sink_steps = tl.cdiv(num_sinks, BLOCK_N)
    window_steps = tl.cdiv(last_position + 1 - first_step, BLOCK_N)
    for step in tl.range(0, sink_steps + window_steps):
        is_sink_step = step < sink_steps
        first_key = tl.where(is_sink_step, step * BLOCK_N, first_step + (step - sink_steps) * BLOCK_N)
        end_key = tl.where(is_sink_step, num_sinks, last_position + 1)
        keys = first_key + offs_n
        # Pages before the window may have been freed, slots past the last row may never have been written.
        is_read = (keys < end_key) & ((keys >= window_start) | (keys < n_init))

        if BLOCK_SIZE % BLOCK_N == 0:
            page = tl.load(pages_ptr + first_key // BLOCK_SIZE).to(tl.int64)
            slot = (first_key % BLOCK_SIZE + offs_n).to(tl.int64)
        else:
            page = tl.load(pages_ptr + keys // BLOCK_SIZE, mask=is_read, other=0).to(tl.int64)
            slot = (keys % BLOCK_SIZE).to(tl.int64)
        k_rows = page * stride_k_block + slot * stride_k_token
        v_rows = page * stride_v_block + slot * stride_v_token
        load_mask = is_read[:, None]
        if HEAD_SIZE != BLOCK_D:
            load_mask = load_mask & (offs_d < HEAD_SIZE)[None, :]
        k = tl.load(k_ptr + k_rows[:, None] + offs_d[None, :], mask=load_mask, other=0.0)  # [BLOCK_N, BLOCK_D]
        v = tl.load(v_ptr + v_rows[:, None] + offs_d[None, :], mask=load_mask, other=0.0)  # [BLOCK_N, BLOCK_D]

        scores = tl.dot(q, tl.trans(k.to(COMPUTE_DTYPE)), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if HAS_SOFT_CAP:
            # tanh by an exponential that can't overflow; exponent_scale restores the factor soft_cap.
            capped = scores * (logit_scale / soft_cap)
            decay = tl.exp2(tl.abs(capped) * (-2.0 * LOG2E))
            magnitude = (1.0 - decay) / (1.0 + decay)
            scores = tl.where(capped < 0, -magnitude, magnitude)
        # Steps that every row sees whole need no mask. A row never sees a key that wasn't read.
        end_step = first_key + BLOCK_N
        in_every_band = (first_key > last_position - n_local) | (end_step <= n_init)
        if not ((end_step <= tl.minimum(end_key, first_position + 1)) & in_every_band):
            in_band = (position - keys[None, :] < n_local) | (keys < n_init)[None, :]
            scores = tl.where(in_band & (keys[None, :] <= position), scores, float("-inf"))

        new_max = tl.maximum(row_max, tl.max(scores, 1) * exponent_scale)
        p = tl.exp2(scores * exponent_scale - new_max[:, None])
        rescale = tl.exp2(row_max - new_max)
        row_sum = row_sum * rescale + tl.sum(p, 1)
        row_max = new_max
        acc = tl.dot(p.to(COMPUTE_DTYPE), v.to(COMPUTE_DTYPE), acc * rescale[:, None], input_precision="ieee")

    result = acc / row_sum[:, None]
    if HAS_V_SCALE:
        result *= tl.load(v_scale_ptr)
    out_rows = token * stride_out_token + head * stride_out_head
    tl.store(out_ptr + out_rows[:, None] + offs_d[None, :], result.to(out_ptr.dtype.element_ty), mask=row_mask)


def config_for(head_size: int, dtype_size: int, capability: int = 90) -> TileConfig:
    """Launch shape for a head size, a query element size and a GPU. ``block_m`` is the same on every GPU.

    Args:
        head_size: True head size, a multiple of 16 up to 256.
        dtype_size: Bytes of one query element: 1 (fp8, computed in bf16), 2 or 4.
        capability: Compute capability times ten.

    Raises:
        ValueError: The head size or element size isn't supported.
    """
    if head_size % 16 != 0 or not 16 <= head_size <= MAX_HEAD_SIZE:
        raise ValueError(f"head_size {head_size} is not a multiple of 16 between 16 and {MAX_HEAD_SIZE}")
    if dtype_size not in (1, 2, 4):
        raise ValueError(f"query elements of {dtype_size} bytes are not supported; expected 1 (fp8), 2 or 4")
    key = (max(64, triton.next_power_of_2(head_size)), max(2, dtype_size))
    config = _CONFIGS[key]
    if capability < 90:
        config = replace(config, block_n=_BLOCK_N_BEFORE_HOPPER.get(key, config.block_n))
    return config


def tile_rows_for(num_heads: int, num_kv_heads: int, head_size: int, dtype_size: int) -> int:
    """Query tokens of a full tile; never a function of any length.

    Args:
        num_heads: Query heads on this device.
        num_kv_heads: KV heads on this device.
        head_size: True head size.
        dtype_size: Bytes of one query element.

    Raises:
        ValueError: The heads don't divide, or the head size or element size isn't supported.
    """
    return max(1, config_for(head_size, dtype_size).block_m // _group_size(num_heads, num_kv_heads))


def kernel_constants(
    config: TileConfig,
    *,
    q_dtype: torch.dtype,
    group: int,
    block_size: int,
    head_size: int,
    tile_rows: int,
    has_soft_cap: bool = False,
    has_q_scale: bool = False,
    has_k_scale: bool = False,
    has_v_scale: bool = False,
) -> dict[str, object]:
    """Compile-time arguments of the kernel: what a variant is keyed on. No length is among them.

    Args:
        config: Launch shape.
        q_dtype: Dtype of the queries.
        group: Query heads per KV head.
        block_size: Tokens of a page.
        head_size: True head size.
        tile_rows: Tokens of a full tile.
        has_soft_cap: Whether logits are capped.
        has_q_scale: Whether the queries have a dequantisation scale.
        has_k_scale: Whether the keys have a dequantisation scale.
        has_v_scale: Whether the values have a dequantisation scale.
    """
    return {
        "GROUP": group,
        "BLOCK_SIZE": block_size,
        "HEAD_SIZE": head_size,
        "BLOCK_M": max(16, triton.next_power_of_2(tile_rows * group)),
        "BLOCK_N": config.block_n,
        "BLOCK_D": triton.next_power_of_2(head_size),
        "COMPUTE_DTYPE": _COMPUTE_DTYPES[q_dtype],
        "HAS_SOFT_CAP": has_soft_cap,
        "HAS_Q_SCALE": has_q_scale,
        "HAS_K_SCALE": has_k_scale,
        "HAS_V_SCALE": has_v_scale,
    }


def triangle_prefill(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: torch.Tensor,
    *,
    n_init: int,
    n_local: int,
    scale: float,
    out: torch.Tensor,
    tile_rows: int,
    q_scale: torch.Tensor | None = None,
    k_scale: torch.Tensor | None = None,
    v_scale: torch.Tensor | None = None,
    soft_cap: float = 0.0,
) -> None:
    """Attention of band rows over the first ``n_init`` keys and a trailing window, written to ``out`` in place.

    Rows of ``out`` that no tile covers stay as they are. The call launches one kernel and never waits for the device.

    Args:
        q: Queries, [num_tokens, num_heads, head_size], bf16/fp16/fp32/fp8_e4m3, last dim contiguous.
        k_cache: Keys, [num_blocks, num_kv_heads, block_size, head_size], any strides with a contiguous last dim; the
            dtype of ``q``, or fp8 (e4m3 or e5m2).
        v_cache: Values, like ``k_cache``.
        block_table: Page of each block of each request, [num_reqs, max_blocks], int32.
        tiles: Query tiles, [num_tiles, 4], int32: row of ``block_table``, first row in ``q``, number of rows (at least
            1, at most ``tile_rows``), absolute position of the first row in tokens. An all-zero tile is idle.
        n_init: Sink keys at the start of the prompt, in tokens.
        n_local: Window in tokens, counting the query's own position.
        scale: Softmax scale, from the true head size.
        out: Output, shape of ``q``, bf16/fp16/fp32, last dim contiguous.
        tile_rows: Tokens of a full tile, normally ``tile_rows_for(...)``.
        q_scale: Dequantisation scale of an fp8 ``q``, one fp32 on the device; None is 1.
        k_scale: Dequantisation scale of fp8 keys, like ``q_scale``.
        v_scale: Dequantisation scale of fp8 values, like ``q_scale``.
        soft_cap: Logits become ``soft_cap * tanh(logit / soft_cap)``; 0 is off.

    Raises:
        ValueError: A shape, dtype, stride or parameter is outside what the kernel takes.
    """
    _check_tensors(q, k_cache, v_cache, block_table, tiles, out)
    _check_parameters(n_init=n_init, n_local=n_local, scale=scale, soft_cap=soft_cap)
    for name, factor in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale)):
        if factor is not None and (factor.numel() != 1 or factor.dtype != torch.float32 or factor.device != q.device):
            raise ValueError(
                f"{name} is {factor.dtype} {list(factor.shape)} on {factor.device}; expected one float32 on {q.device}"
            )
    _, num_heads, head_size = q.shape
    num_kv_heads, block_size = k_cache.shape[1:3]
    group = _group_size(num_heads, num_kv_heads)
    capability = _capability(q.device)
    if torch.float8_e4m3fn in (q.dtype, k_cache.dtype) and capability < 89:
        raise ValueError(f"float8_e4m3fn needs compute capability 8.9, this GPU has {capability / 10}")
    config = config_for(head_size, q.element_size(), capability)
    max_rows = max(1, config.block_m // group)
    if not 1 <= tile_rows <= max_rows:
        raise ValueError(f"tile_rows {tile_rows} is outside 1-{max_rows} for {group} query heads a KV head")
    if tiles.shape[0] == 0:
        return

    triangle_prefill_kernel[(tiles.shape[0], num_kv_heads)](
        q,
        k_cache,
        v_cache,
        out,
        block_table,
        tiles,
        q_scale,
        k_scale,
        v_scale,
        float(scale),
        float(soft_cap),
        n_init,
        n_local,
        q.stride(0),
        q.stride(1),
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        out.stride(0),
        out.stride(1),
        block_table.stride(0),
        tiles.stride(0),
        **kernel_constants(
            config,
            q_dtype=q.dtype,
            group=group,
            block_size=block_size,
            head_size=head_size,
            tile_rows=tile_rows,
            has_soft_cap=soft_cap > 0,
            has_q_scale=q_scale is not None,
            has_k_scale=k_scale is not None,
            has_v_scale=v_scale is not None,
        ),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )


def _group_size(num_heads: int, num_kv_heads: int) -> int:
    if num_kv_heads < 1 or num_heads % num_kv_heads != 0:
        raise ValueError(f"num_heads {num_heads} is not a multiple of num_kv_heads {num_kv_heads}")
    return num_heads // num_kv_heads


def _capability(device: torch.device) -> int:
    """Compute capability times ten; off CUDA, where only Triton's interpreter runs, that of Hopper."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _check_parameters(*, n_init: int, n_local: int, scale: float, soft_cap: float) -> None:
    if not 0 <= n_init <= _INT32_MAX:
        raise ValueError(f"n_init {n_init} is outside 0-{_INT32_MAX}")
    if not 1 <= n_local <= _INT32_MAX:
        raise ValueError(f"n_local {n_local} is outside 1-{_INT32_MAX}; the window counts the query itself")
    if not scale > 0:
        raise ValueError(f"scale {scale} is not positive")
    if not soft_cap >= 0:
        raise ValueError(f"soft_cap {soft_cap} is negative; 0 turns it off")


def _check_tensors(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    tiles: torch.Tensor,
    out: torch.Tensor,
) -> None:
    if q.ndim != 3 or q.dtype not in _QUERY_DTYPES:
        raise ValueError(
            f"q is {q.dtype} {list(q.shape)}; expected [num_tokens, num_heads, head_size] in {_QUERY_DTYPES}"
        )
    if out.shape != q.shape or out.dtype not in _OUTPUT_DTYPES:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}; expected {list(q.shape)} in {_OUTPUT_DTYPES}")
    if k_cache.ndim != 4 or k_cache.shape[3] != q.shape[2]:
        raise ValueError(
            f"k_cache is {list(k_cache.shape)}; expected [num_blocks, num_kv_heads, block_size, {q.shape[2]}]"
        )
    if v_cache.shape != k_cache.shape or v_cache.dtype != k_cache.dtype:
        raise ValueError(
            f"v_cache is {v_cache.dtype} {list(v_cache.shape)}; "
            f"expected k_cache's {k_cache.dtype} {list(k_cache.shape)}"
        )
    if k_cache.dtype != q.dtype and k_cache.dtype not in _FP8_CACHE_DTYPES:
        raise ValueError(f"the cache is {k_cache.dtype}; expected q's {q.dtype} or one of {_FP8_CACHE_DTYPES}")
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("out", out)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} has stride {tensor.stride(-1)}; expected 1")
    for name, tensor, columns in (("block_table", block_table, None), ("tiles", tiles, 4)):
        if tensor.ndim != 2 or tensor.dtype != torch.int32 or columns not in (None, tensor.shape[1]):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; expected int32 [rows, {columns or 'blocks'}]"
            )
        if tensor.stride(1) != 1:
            raise ValueError(f"the last dimension of {name} has stride {tensor.stride(1)}; expected 1")
    for name, tensor in (("k_cache", k_cache), ("v_cache", v_cache), ("block_table", block_table), ("tiles", tiles)):
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q on {q.device}")
    if out.device != q.device:
        raise ValueError(f"out is on {out.device}, q on {q.device}")
