"""One transfer for the small integer arrays that a step's plan sends to the device."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

# Pointers that are multiples of 16 bytes let kernels load vectors.
_ALIGNMENT = 4


def upload(arrays: Sequence[np.ndarray], device: torch.device) -> list[torch.Tensor]:
    """Copies integer arrays to a device in one piece, without waiting for it.

    The staging memory is pinned, and PyTorch's host allocator reuses it only once the copy is done.

    Args:
        arrays: Integers within int32, of any shapes.
        device: Where to.

    Returns:
        int32 tensors of the same shapes; on a GPU views of one buffer, each aligned to 16 bytes.
    """
    if device.type == "cpu":
        return [torch.from_numpy(array.astype(np.int32, copy=False)) for array in arrays]
    return _views(_stage(arrays, pin_memory=device.type == "cuda").to(device, non_blocking=True), arrays)


def _stage(arrays: Sequence[np.ndarray], *, pin_memory: bool) -> torch.Tensor:
    """The arrays one after the other in host memory."""
    offsets, end = _offsets(arrays)
    staging = torch.empty(end, dtype=torch.int32, pin_memory=pin_memory)
    host = staging.numpy()
    for array, offset in zip(arrays, offsets, strict=True):
        host[offset : offset + array.size] = array.reshape(-1)
    return staging


def _views(buffer: torch.Tensor, arrays: Sequence[np.ndarray]) -> list[torch.Tensor]:
    offsets, _ = _offsets(arrays)
    return [
        buffer[offset : offset + array.size].view(array.shape) for array, offset in zip(arrays, offsets, strict=True)
    ]


def _offsets(arrays: Sequence[np.ndarray]) -> tuple[list[int], int]:
    """Where each array starts, and the end."""
    offsets, end = [], 0
    for array in arrays:
        offsets.append(end)
        end += math.ceil(array.size / _ALIGNMENT) * _ALIGNMENT
    return offsets, end
