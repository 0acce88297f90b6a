"""What every dynamic pattern has: validated parameters and a selection."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, ClassVar, Literal, Protocol

import torch
from pydantic import ConfigDict

from vllm_trimix.patterns.selection import Chunk, Selection, Tiles

BlockSize = Literal[64, 128]
"""Rows of a tile and keys of a block, in tokens, that the kernels have."""

STRICT = ConfigDict(extra="forbid", strict=True)


class DynamicPattern(Protocol):
    """A pattern whose keys are chosen per head while the prompt is prefilled.

    Attributes:
        name: What users write as ``pattern``.
        source: Paper and section.
        last_rows: Last rows of a chunk that the choice looks at; 0 when it looks at none.
        has_columns: Whether it may select single keys.
        has_band: Whether it cuts selected blocks to a band.
        block_size: Rows of a tile and keys of a block.
        budget: Keys that a row sees by the parameters alone, where there are so many; None when the prompt decides.
            Rounding to blocks comes on top.
        kind: Heads of one kind are selected together.
    """

    name: ClassVar[str]
    source: ClassVar[str]
    last_rows: ClassVar[int]
    has_columns: ClassVar[bool]
    has_band: ClassVar[bool]

    @property
    def block_size(self) -> int: ...

    @property
    def budget(self) -> int | None: ...

    @property
    def kind(self) -> tuple[object, ...]: ...

    @classmethod
    def select(cls, heads: Sequence[Any], chunk: Chunk) -> Selection:
        """Chooses keys for a chunk.

        Args:
            heads: A query head's pattern each, all of one ``kind`` and ``block_size``.
            chunk: Rows and keys.
        """


class OneKind:
    """For patterns whose heads can all be selected together, whatever their parameters."""

    name: ClassVar[str]

    @property
    def kind(self) -> tuple[str]:
        """Heads of one kind are selected together."""
        return (self.name,)


def tiles_of(block_size: int, chunk: Chunk) -> Tiles:
    """The tiles of a chunk's sparse rows."""
    return Tiles(block_size, chunk.position, chunk.num_rows)


@lru_cache(maxsize=1024)
def per_head(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """One number a head, on the device: filled there, because a copy from the host waits for the device."""
    runs = [torch.full((len(list(run)),), value, device=device) for value, run in itertools.groupby(values)]
    return torch.cat(runs)
