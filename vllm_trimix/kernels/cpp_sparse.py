"""Attention over a sparse index, compiled for the CPU (``csrc/cpu``): a fast ``torch_sparse.sparse_prefill``."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch

from vllm_trimix.kernels.sparse_index import SparseIndex

LIBRARY = Path(__file__).parents[1] / "_cpu.abi3.so"
BF16_ONLY = ("amx", "avx512_bf16", "amx_emulated")

MIN_HEAD_SIZE, MAX_HEAD_SIZE, HEAD_SIZE_STEP = 16, 256, 8
"""Head sizes that the compiled kernel takes."""


@cache
def unavailable_reason() -> str | None:
    """Why the compiled kernel can't be used, or None; loads it on the first call."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built: installing the package builds it beside a C++ compiler and a CPU torch"
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        return f"{LIBRARY.name} doesn't load, it was perhaps built for another torch: {error}"
    torch.library.register_fake("vllm_trimix::sparse_prefill", _fake)
    return None


def is_available() -> bool:
    """Whether the compiled kernel can be used."""
    return unavailable_reason() is None


def takes(head_size: int) -> bool:
    """Whether the compiled kernel takes heads of this size."""
    return MIN_HEAD_SIZE <= head_size <= MAX_HEAD_SIZE and head_size % HEAD_SIZE_STEP == 0


def available_isas() -> list[str]:
    """Names of the kernels that this CPU runs, fastest first; ``amx_emulated``, for tests, is last."""
    return torch.ops.vllm_trimix.cpu_isas().split(",") if is_available() else []


def sparse_prefill(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    index: SparseIndex,
    *,
    scale: float,
    out: torch.Tensor,
    keys_read: torch.Tensor | None = None,
    isa: str | None = None,
) -> None:
    """Attention of one chunk's rows over the listed keys, into ``out``.

    Args:
        q: Queries of the index's rows, [num_rows, num_heads, head_size], bf16/fp16/fp32; head_size a multiple of 8
            from 16 to 256, contiguous.
        k: All keys so far, [num_kv_heads, num_keys, head_size]; ``num_heads`` is a multiple of ``num_kv_heads``.
        v: Values, like ``k``.
        index: What each tile of each head reads; blocks of a multiple of 16 keys, up to 256.
        scale: Softmax scale, above 0.
        out: Output, shaped and typed like ``q``.
        keys_read: Keys loaded for each tile, int32 [num_heads, num_tiles], written; None to leave it.
        isa: One of ``available_isas()``; None: the fastest for the inputs.

    Raises:
        RuntimeError: The kernel isn't built, the inputs don't fit together, a list is out of order or ``isa`` can't
            run here or not on these inputs.
    """
    reason = unavailable_reason()
    if reason:
        raise RuntimeError(reason)
    if index.tiles.num_rows != q.shape[0]:
        raise RuntimeError(f"q has shape {list(q.shape)}, the index has {index.tiles.num_rows} rows")
    torch.ops.vllm_trimix.sparse_prefill(
        q,
        k,
        v,
        out,
        index.block_count,
        index.block_index,
        index.column_count,
        index.column_index,
        index.band,
        index.tiles.block_size,
        index.tiles.position,
        scale,
        keys_read,
        isa or "",
    )


def _fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    block_count: torch.Tensor,
    block_index: torch.Tensor,
    column_count: torch.Tensor | None,
    column_index: torch.Tensor | None,
    band: torch.Tensor | None,
    block_size: int,
    position: int,
    scale: float,
    keys_read: torch.Tensor | None,
    isa: str,
) -> None:
    """The operator without data: it returns nothing and writes in place."""
