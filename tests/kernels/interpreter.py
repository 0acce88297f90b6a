"""Processes in which Triton interprets or compiles, and what the kernels are given there: tensors, pages, arguments.

Everything that imports Triton runs in a worker process: the interpreter must be chosen before Triton is imported, and
that choice must not leak into the other tests.
"""

from __future__ import annotations

import math
import mmap
import os
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

import torch

from vllm_trimix.kernels.layer_call import LayerCall, Scales
from vllm_trimix.kernels.reference import gather_pages

# Linux; the name is only in Python 3.13's mmap.
_MAP_NORESERVE = 0x4000
# A wrapped 32-bit offset lands before the tensor: the reservation starts this many elements earlier, so that the
# mutation fails its test instead of the process.
_HUGE_STRIDE = 2**30
_HUGE_MARGIN = 2**31


def interpreter_pool() -> ProcessPoolExecutor:
    """One fresh process in which Triton interprets."""
    return ProcessPoolExecutor(max_workers=1, mp_context=get_context("spawn"), initializer=use_interpreter)


def compiler_pool() -> ProcessPoolExecutor:
    """One fresh process in which Triton would compile."""
    return ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=_use_compiler)


def use_interpreter() -> None:
    """Makes a fresh process one in which Triton interprets."""
    os.environ["TRITON_INTERPRET"] = "1"
    torch.set_num_threads(1)
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    from vllm_trimix.kernels.triton_triangle import triangle_prefill_kernel

    assert isinstance(triangle_prefill_kernel, interpreter.InterpretedFunction)

    # The interpreter holds bf16 as uint16. Its dot multiplies those integers and its fp32 -> bf16 cast truncates
    # (Triton 3.6 and 3.9): go through fp32, and round to nearest even as the hardware does. fp16 products are right
    # but slow, and exact in fp32.
    np.seterr(invalid="ignore")
    builder = interpreter.InterpreterBuilder
    plain_dot, plain_cast = builder.create_dot, builder.cast_impl

    def widen(handle: Any) -> Any:
        if handle.dtype.scalar == tl.float8e4nv:
            values = torch.from_numpy(np.ascontiguousarray(handle.data)).view(torch.float8_e4m3fn).float()
            return interpreter.TensorHandle(values.numpy().reshape(handle.data.shape), tl.float32)
        if handle.dtype.scalar == tl.float16:
            return interpreter.TensorHandle(handle.data.astype(np.float32), tl.float32)
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return plain_dot(self, widen(a), widen(b), *rest)

    def cast_impl(self: Any, src: Any, dst_type: Any) -> Any:
        if src.dtype.scalar != tl.float32 or dst_type.scalar != tl.bfloat16:
            return plain_cast(self, src, dst_type)
        rounded = torch.from_numpy(np.ascontiguousarray(src.data)).to(torch.bfloat16).view(torch.uint16)
        return interpreter.TensorHandle(rounded.numpy().reshape(src.data.shape), tl.bfloat16)

    builder.create_dot, builder.cast_impl = create_dot, cast_impl
    # The interpreter copies every storage back to its device, here onto itself: that would touch all of a huge one.
    interpreter.GridExecutor._restore_args_dev = lambda *args: None


def _use_compiler() -> None:
    os.environ.pop("TRITON_INTERPRET", None)


def interpreted_bf16_product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """[16, 16] bf16 matrix product by the interpreter's ``tl.dot``, rounded to bf16."""
    import triton
    import triton.language as tl

    @triton.jit
    def product_kernel(a_ptr, b_ptr, out_ptr):  # type: ignore[no-untyped-def]
        offs = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
        product = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs))
        tl.store(out_ptr + offs, product.to(tl.bfloat16))

    out = torch.empty(16, 16, dtype=torch.bfloat16)
    product_kernel[(1,)](a, b, out)
    return out


def strided(shape: tuple[int, ...], dtype: torch.dtype, *, huge: bool) -> torch.Tensor:
    """A NaN-filled tensor, or a zero one whose rows are 2**30 elements apart in reserved, mostly untouched memory."""
    if not huge:
        return torch.full(shape, math.nan).to(dtype)
    numel = _HUGE_MARGIN + shape[0] * _HUGE_STRIDE
    size = numel * torch.empty(0, dtype=dtype).element_size()
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    inner = torch.empty(shape[1:], device="meta").stride()
    return torch.frombuffer(memory, dtype=dtype).as_strided(shape, (_HUGE_STRIDE, *inner), _HUGE_MARGIN)


def on_device(arguments: dict[str, Any], device: str) -> dict[str, Any]:
    """The same tensors on a device, strides, offsets and shared memory included; bytes outside them are all ones."""
    storages: dict[int, torch.Tensor] = {}
    moved = dict(arguments)
    for name, tensor in arguments.items():
        if name == "partials" and tensor is not None:
            moved[name] = type(tensor)(tensor.values.to(device), tensor.stats.to(device))
        if not isinstance(tensor, torch.Tensor):
            continue
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in storages:
            memory = torch.empty(storage.nbytes(), dtype=torch.uint8, device=device)
            storages[storage.data_ptr()] = memory if storage.nbytes() > 2**30 else memory.fill_(0xFF)
        memory = storages[storage.data_ptr()].view(tensor.dtype)
        moved[name] = memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).copy_(tensor)
    return moved


def read_pages(cache: torch.Tensor, pages: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Keys or values of one request, [num_kv_heads, num_keys, head_size], fp64; zeros for what was never written.

    Args:
        cache: [num_blocks, num_kv_heads, block_size, head_size].
        pages: Its row of the block table.
        num_keys: Keys from the start of the prompt.
    """
    # 8-bit floats can't be gathered everywhere, bytes can.
    raw = cache.view(torch.uint8) if cache.dtype.itemsize == 1 else cache
    read = gather_pages(raw, pages, num_keys).contiguous().view(cache.dtype)
    return read.double().nan_to_num().transpose(0, 1)


def layer_call(arguments: dict[str, Any]) -> tuple[LayerCall, dict[str, Any]]:
    """A kernel's arguments by name: those that are a layer's, and the others."""
    left = dict(arguments)
    scales = Scales(*(left.pop(name) for name in ("q_scale", "k_scale", "v_scale")))
    names = ("q", "k_cache", "v_cache", "out", "scale", "soft_cap")
    return LayerCall(**{name: left.pop(name) for name in names}, scales=scales), left
