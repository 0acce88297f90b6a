"""How much of the keys the dynamic patterns of a layer group read."""

from __future__ import annotations

import torch

from vllm_trimix.kernels.sparse_index import SparseIndex


class KeyCounter:
    """Keys read and keys before the rows, since the start, both per tile and head.

    Attributes:
        read: int64 [1], on the device: counted by the kernels.
        causal: What dense attention would have read.
    """

    def __init__(self, device: torch.device) -> None:
        self.read = torch.zeros(1, dtype=torch.int64, device=device)
        self.causal = 0

    def total(self) -> int:
        """Keys read so far; on a GPU copied aside of the work that is queued, so that it is not waited for."""
        if self.read.device.type != "cuda":
            return int(self.read)
        with torch.cuda.stream(torch.cuda.Stream(self.read.device)):
            return int(self.read)

    def add(self, keys_read: torch.Tensor, index: SparseIndex) -> None:
        self.read += keys_read.sum()
        tiles = index.tiles
        first = (tiles.first + 1) * tiles.block_size
        whole = tiles.num_tiles * first + tiles.block_size * tiles.num_tiles * (tiles.num_tiles - 1) // 2
        beyond = tiles.num_blocks * tiles.block_size - tiles.position - tiles.num_rows
        self.causal += index.block_count.shape[0] * (whole - beyond)
