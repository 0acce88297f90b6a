"""Every key, for single heads of a layer whose other heads are sparse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic.dataclasses import dataclass

from vllm_trimix.patterns.base import STRICT, BlockSize, OneKind, tiles_of
from vllm_trimix.patterns.selection import EVERYTHING, Chunk, Selection


@dataclass(frozen=True, config=STRICT)
class Dense(OneKind):
    """Causal attention.

    Attributes:
        block_size: Rows of a tile and keys of a block.
    """

    name: ClassVar[str] = "dense"
    source: ClassVar[str] = "causal attention"
    last_rows: ClassVar[int] = 0
    has_columns: ClassVar[bool] = False
    has_band: ClassVar[bool] = False

    block_size: BlockSize = 64

    @property
    def budget(self) -> int:
        """All keys."""
        return EVERYTHING

    @classmethod
    def select(cls, heads: Sequence[Dense], chunk: Chunk) -> Selection:
        """Every block up to the tile's own."""
        tiles = tiles_of(heads[0].block_size, chunk)
        return Selection(tiles, tiles.causal(chunk.q.device).expand(len(heads), -1, -1))
