"""A-shape: sink keys and a local window, exact by row. MInference's ``stream_llm``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from pydantic.dataclasses import dataclass

from vllm_trimix.patterns.base import STRICT, BlockSize, OneKind, per_head, tiles_of
from vllm_trimix.patterns.selection import EVERYTHING, Chunk, Selection


@dataclass(frozen=True, config=STRICT)
class AShape(OneKind):
    """Parameters, in tokens; defaults of MInference's search.

    Attributes:
        n_init: Sink keys that every query sees.
        n_local: Trailing window, counting the query's own position.
        block_size: Rows of a tile and keys of a block.
    """

    name: ClassVar[str] = "a_shape"
    source: ClassVar[str] = "StreamingLLM (arXiv 2309.17453); MInference (arXiv 2407.02490), A-shape"
    last_rows: ClassVar[int] = 0
    has_columns: ClassVar[bool] = False
    has_band: ClassVar[bool] = True

    n_init: int = Field(default=100, ge=0, le=EVERYTHING)
    n_local: int = Field(default=800, ge=1, le=EVERYTHING)
    block_size: BlockSize = 64

    @property
    def budget(self) -> int:
        """Sinks and window."""
        return self.n_init + self.n_local

    @classmethod
    def select(cls, heads: Sequence[AShape], chunk: Chunk) -> Selection:
        """Every block that holds a key some row of the tile sees; the band cuts it to the row."""
        device = chunk.q.device
        tiles = tiles_of(heads[0].block_size, chunk)
        n_init = per_head(tuple(head.n_init for head in heads), device)
        n_local = per_head(tuple(head.n_local for head in heads), device)
        first_key = torch.arange(tiles.num_blocks, device=device) * tiles.block_size
        last_key = first_key + tiles.block_size - 1
        first_row = tiles.numbers(device)[:, None] * tiles.block_size
        blocks = (first_key < n_init[:, None, None]) | (first_row - last_key < n_local[:, None, None])
        return Selection(tiles, blocks & tiles.causal(device), band=torch.stack((n_init, n_local), 1).int())
