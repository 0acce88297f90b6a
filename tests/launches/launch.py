"""One launch of a Triton kernel, as the code that launches it says; imports neither Triton nor vLLM."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class TensorArgument:
    """A tensor as a launch gets it.

    Attributes:
        shape: Its shape.
        strides: In elements.
        dtype: Its name in torch.
        offset: Bytes from the start of its allocation, which CUDA aligns to 512 bytes.
        extent: Bytes from its first element to the end of its last.
        values: What is in it, where the host made it.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: str
    offset: int
    extent: int
    values: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class Launch:
    """One launch.

    Attributes:
        kernel: Name of the kernel.
        grid: Programs.
        tensors: By argument.
        numbers: Run-time integers and floats, by argument.
        constants: Compile-time arguments.
        aligned: Arguments that the kernel is compiled for multiples of 16 of.
        key: What Triton keys the compiled kernel on.
        num_warps: Warps of a program.
        source: Makes the compiled kernel; None where an interpreter runs.
    """

    kernel: str
    grid: tuple[int, ...]
    tensors: dict[str, TensorArgument]
    numbers: dict[str, float]
    constants: dict[str, Any]
    aligned: tuple[str, ...]
    key: str
    num_warps: int
    source: Callable[[], Any] | None = field(compare=False, repr=False)


def argument_of(tensor: torch.Tensor, values: np.ndarray | None = None) -> TensorArgument:
    """A tensor as an argument, with what is in it where the host knows."""
    size = tensor.element_size()
    last = sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return TensorArgument(
        shape=tuple(tensor.shape),
        strides=tensor.stride(),
        dtype=str(tensor.dtype).removeprefix("torch."),
        offset=int(tensor.storage_offset()) * size,
        extent=(last + 1) * size if tensor.numel() else 0,
        values=values,
    )
