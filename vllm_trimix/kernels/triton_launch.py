"""What the attention kernels share on the host: what they are compiled for, and the checks of what they are given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton.language as tl

from vllm_trimix.kernels.layer_call import LayerCall
from vllm_trimix.kernels.triton_configs import TileConfig, capability_of, group_size

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


@dataclass(frozen=True)
class TensorKinds:
    """What of a layer's tensors a kernel is compiled for. No length is among them.

    Attributes:
        q_dtype: Dtype of the queries.
        cache_dtype: Dtype of the cache.
        num_heads: Query heads.
        num_kv_heads: KV heads.
        head_size: True head size.
        page_size: Tokens of a page.
        cache_stride: Strides of page, head and token in the cache, in elements.
        has_soft_cap: Whether logits are capped.
        has_q_scale: Whether the queries have a dequantisation scale.
        has_k_scale: Whether the keys have a dequantisation scale.
        has_v_scale: Whether the values have a dequantisation scale.
    """

    q_dtype: torch.dtype
    cache_dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_size: int
    page_size: int
    cache_stride: tuple[int, ...]
    has_soft_cap: bool = False
    has_q_scale: bool = False
    has_k_scale: bool = False
    has_v_scale: bool = False

    @classmethod
    def of(cls, call: LayerCall) -> TensorKinds:
        """Those of a layer's tensors, which the kernels take (``check_call``)."""
        num_kv_heads, page_size = call.k_cache.shape[1:3]
        return cls(
            q_dtype=call.q.dtype,
            cache_dtype=call.k_cache.dtype,
            num_heads=call.q.shape[1],
            num_kv_heads=num_kv_heads,
            head_size=call.q.shape[2],
            page_size=page_size,
            cache_stride=call.k_cache.stride()[:3],
            has_soft_cap=call.soft_cap > 0,
            has_q_scale=call.scales.q is not None,
            has_k_scale=call.scales.k is not None,
            has_v_scale=call.scales.v is not None,
        )

    @property
    def group(self) -> int:
        """Query heads of a KV head."""
        return group_size(self.num_heads, self.num_kv_heads)


class LaunchVariant(NamedTuple):
    """What a call needs to know of the kinds of its tensors, found and checked once.

    Attributes:
        config: Launch shape.
        constants: Compile-time arguments.
        options: The compiler's.
    """

    config: TileConfig
    constants: dict[str, object]
    options: dict[str, object]

    @classmethod
    def of(cls, config: TileConfig, constants: dict[str, object]) -> LaunchVariant:
        """The variant of a launch shape."""
        options: dict[str, object] = {
            "num_warps": config.num_warps,
            "num_stages": config.num_stages,
            "maxnreg": config.max_registers,
            "enable_fp_fusion": True,
        }
        return cls(config, constants, options)


def cache_constants(kinds: TensorKinds) -> dict[str, object]:
    """Compile-time arguments of every kernel that multiplies queries and paged keys."""
    return {
        "STRIDE_PAGE": kinds.cache_stride[0],
        "STRIDE_HEAD": kinds.cache_stride[1],
        "STRIDE_TOKEN": kinds.cache_stride[2],
        "PAGE_SIZE": kinds.page_size,
        "HEAD_SIZE": kinds.head_size,
        "SCORE_DTYPE": matrix_dtypes(kinds.q_dtype, kinds.cache_dtype)["SCORE_DTYPE"],
        "HAS_Q_SCALE": kinds.has_q_scale,
        "HAS_K_SCALE": kinds.has_k_scale,
    }


def attention_constants(config: TileConfig, kinds: TensorKinds) -> dict[str, object]:
    """Compile-time arguments of every kernel that computes attention."""
    return {
        **cache_constants(kinds),
        "GROUP": kinds.group,
        "BLOCK_N": config.block_n,
        "LOOKAHEAD": config.lookahead,
        "COMPUTE_DTYPE": matrix_dtypes(kinds.q_dtype, kinds.cache_dtype)["COMPUTE_DTYPE"],
        "HAS_SOFT_CAP": kinds.has_soft_cap,
        "HAS_V_SCALE": kinds.has_v_scale,
    }


def matrix_dtypes(q_dtype: torch.dtype, cache_dtype: torch.dtype) -> dict[str, tl.dtype]:
    """What queries and keys, and probabilities and values, are multiplied in.

    Equal fp8 dtypes multiply as they are, which is exact and needs no conversion.
    """
    compute = _COMPUTE_DTYPES[q_dtype]
    native_fp8 = q_dtype == cache_dtype == torch.float8_e4m3fn
    return {"SCORE_DTYPE": tl.float8e4nv if native_fp8 else compute, "COMPUTE_DTYPE": compute}


def check_call(call: LayerCall, block_table: torch.Tensor) -> None:
    """Raises ValueError for a layer's tensor or number that the kernels don't take.

    Args:
        call: The layer's.
        block_table: Pages of each request, [num_requests, max_pages], int32.
    """
    q, k_cache, v_cache, out = call[:4]
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
    check_table("block_table", block_table)
    check_devices(q.device, k_cache=k_cache, v_cache=v_cache, out=out, block_table=block_table)
    check_logits(scale=call.scale, soft_cap=call.soft_cap)
    check_scales(q.device, q_scale=call.scales.q, k_scale=call.scales.k, v_scale=call.scales.v)


def capability_for(q_dtype: torch.dtype, cache_dtype: torch.dtype, device: torch.device) -> int:
    """Compute capability of a GPU, times ten.

    Raises:
        ValueError: It lacks one of the dtypes.
    """
    capability = capability_of(device)
    if torch.float8_e4m3fn in (q_dtype, cache_dtype) and capability < 89:
        raise ValueError(f"float8_e4m3fn needs compute capability 8.9, this GPU has {capability / 10}")
    return capability


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
