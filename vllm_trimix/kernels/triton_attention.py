"""What the attention kernels share: device functions, the dtypes they multiply in, checks of their tensors."""

import torch
import triton
import triton.language as tl

QUERY_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn)
OUTPUT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FP8_CACHE_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
# What the probabilities and values are multiplied in, by query dtype. Every fp8 value is exact in fp16.
_COMPUTE_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
    torch.float8_e4m3fn: tl.float16,
}


@triton.jit
def key_rows(pages_ptr, keys, is_read, PAGE_SIZE: tl.constexpr, STRIDE_PAGE: tl.constexpr, STRIDE_TOKEN: tl.constexpr):
    """int64 offsets of one request's keys in a paged cache; only pages of keys that are read are looked up."""
    page = tl.load(pages_ptr + keys // PAGE_SIZE, mask=is_read, other=0).to(tl.int64)
    return page * STRIDE_PAGE + (keys % PAGE_SIZE).to(tl.int64) * STRIDE_TOKEN


@triton.jit
def load_rows(kv_ptr, rows, is_read, offs_d, HEAD_SIZE: tl.constexpr, BLOCK_D: tl.constexpr):
    """[keys, BLOCK_D] keys or values at ``rows``; zeros where none is read."""
    mask = is_read[:, None]
    if HEAD_SIZE != BLOCK_D:
        mask = mask & (offs_d < HEAD_SIZE)[None, :]
    return tl.load(kv_ptr + rows[:, None] + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
def scores_of(q, k, SCORE_DTYPE: tl.constexpr):
    """[BLOCK_M, NUM_KEYS] fp32, without any scale."""
    return tl.dot(q, tl.trans(k.to(SCORE_DTYPE)), input_precision="ieee")


@triton.jit
def cap_scores(scores, logit_scale, soft_cap):
    """tanh of the capped logits, by an exponential that can't overflow."""
    capped = scores * (logit_scale / soft_cap)
    decay = tl.exp2(tl.abs(capped) * (-2.0 * 1.4426950408889634))
    magnitude = (1.0 - decay) / (1.0 + decay)
    return tl.where(capped < 0, -magnitude, magnitude)


@triton.jit
def accumulate(acc, row_max, row_sum, scores, v, exponent_scale, COMPUTE_DTYPE: tl.constexpr):
    """One step of the online softmax; ``row_max`` is in units of log2."""
    new_max = tl.maximum(row_max, tl.max(scores, 1) * exponent_scale)
    p = tl.exp2(scores * exponent_scale - new_max[:, None])
    rescale = tl.exp2(row_max - new_max)
    row_sum = row_sum * rescale + tl.sum(p, 1)
    acc = tl.dot(p.to(COMPUTE_DTYPE), v.to(COMPUTE_DTYPE), acc * rescale[:, None], input_precision="ieee")
    return acc, new_max, row_sum


def matrix_dtypes(q_dtype: torch.dtype, cache_dtype: torch.dtype) -> dict[str, tl.dtype]:
    """Compile-time arguments: what queries and keys, and probabilities and values, are multiplied in.

    Equal fp8 dtypes multiply as they are, which is exact and needs no conversion.
    """
    compute = _COMPUTE_DTYPES[q_dtype]
    native_fp8 = q_dtype == cache_dtype == torch.float8_e4m3fn
    return {"SCORE_DTYPE": tl.float8e4nv if native_fp8 else compute, "COMPUTE_DTYPE": compute}


def check_fp8(q_dtype: torch.dtype, cache_dtype: torch.dtype, capability: int) -> None:
    """Raises ValueError where the GPU, by its compute capability times ten, lacks one of the dtypes."""
    if torch.float8_e4m3fn in (q_dtype, cache_dtype) and capability < 89:
        raise ValueError(f"float8_e4m3fn needs compute capability 8.9, this GPU has {capability / 10}")


def check_scales(device: torch.device, **scales: torch.Tensor | None) -> None:
    """Raises ValueError for a dequantisation scale that isn't one fp32 on the device."""
    for name, factor in scales.items():
        if factor is not None and (factor.numel() != 1 or factor.dtype != torch.float32 or factor.device != device):
            raise ValueError(
                f"{name} is {factor.dtype} {list(factor.shape)} on {factor.device}; expected one float32 on {device}"
            )


def check_logits(*, scale: float, soft_cap: float) -> None:
    """Raises ValueError for a softmax scale or a logit cap out of range."""
    if not scale > 0:
        raise ValueError(f"scale {scale} is not positive")
    if not soft_cap >= 0:
        raise ValueError(f"soft_cap {soft_cap} is negative; 0 turns it off")


def check_queries_and_cache(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, out: torch.Tensor) -> None:
    """Raises ValueError for a shape, dtype or stride of a step's tensors that the kernels don't take."""
    if q.ndim != 3 or q.dtype not in QUERY_DTYPES:
        raise ValueError(
            f"q is {q.dtype} {list(q.shape)}; expected [num_tokens, num_heads, head_size] in {QUERY_DTYPES}"
        )
    if out.shape != q.shape or out.dtype not in OUTPUT_DTYPES:
        raise ValueError(f"out is {out.dtype} {list(out.shape)}; expected {list(q.shape)} in {OUTPUT_DTYPES}")
    check_keys(k_cache, q.dtype, q.shape[2])
    for got, expected in ((v_cache.dtype, k_cache.dtype), (v_cache.shape, k_cache.shape)):
        if got != expected:
            raise ValueError(f"v_cache has {got}; expected k_cache's {expected}")
    if v_cache.stride() != k_cache.stride():
        raise ValueError(f"v_cache has strides {v_cache.stride()}; expected k_cache's {k_cache.stride()}")
    for name, tensor in (("q", q), ("k_cache", k_cache), ("v_cache", v_cache), ("out", out)):
        if tensor.stride(-1) != 1:
            raise ValueError(f"the last dimension of {name} has stride {tensor.stride(-1)}; expected 1")
    check_devices(q.device, k_cache=k_cache, v_cache=v_cache, out=out)


def check_keys(k_cache: torch.Tensor, q_dtype: torch.dtype, head_size: int) -> None:
    """Raises ValueError for a cache of keys whose shape or dtype doesn't go with the queries'."""
    if k_cache.ndim != 4 or k_cache.shape[3] != head_size:
        raise ValueError(
            f"k_cache is {list(k_cache.shape)}; expected [num_blocks, num_kv_heads, block_size, {head_size}]"
        )
    if k_cache.dtype != q_dtype and k_cache.dtype not in FP8_CACHE_DTYPES:
        raise ValueError(f"the cache is {k_cache.dtype}; expected q's {q_dtype} or one of {FP8_CACHE_DTYPES}")


def check_table(name: str, tensor: torch.Tensor, columns: int | None = None) -> None:
    """Raises ValueError for a table that isn't int32 [rows, columns], rows contiguous; all of it with ``columns``."""
    if tensor.ndim != 2 or tensor.dtype != torch.int32 or columns not in (None, tensor.shape[1]):
        raise ValueError(f"{name} is {tensor.dtype} {list(tensor.shape)}; expected int32 [rows, {columns or 'blocks'}]")
    if tensor.stride(1) != 1:
        raise ValueError(f"the last dimension of {name} has stride {tensor.stride(1)}; expected 1")
    if columns is not None and not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; expected it contiguous")


def check_devices(device: torch.device, **tensors: torch.Tensor | None) -> None:
    """Raises ValueError for a tensor that isn't where the queries are."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} is on {tensor.device}, q on {device}")
