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
        int32 tensors of the same shapes, views of one buffer, each aligned to 16 bytes.
    """
    offsets, end = [], 0
    for array in arrays:
        offsets.append(end)
        end += math.ceil(array.size / _ALIGNMENT) * _ALIGNMENT
    staging = torch.empty(end, dtype=torch.int32, pin_memory=device.type == "cuda")
    host = staging.numpy()
    for array, offset in zip(arrays, offsets, strict=True):
        host[offset : offset + array.size] = array.reshape(-1)
    buffer = staging.to(device, non_blocking=True)
    return [
        buffer[offset : offset + array.size].view(array.shape) for array, offset in zip(arrays, offsets, strict=True)
    ]
