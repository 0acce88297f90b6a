"""The dynamic patterns of a layer's heads: which are selected together, and how many at once."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from vllm_trimix.patterns.base import DynamicPattern

# Of one block of one tile while it is chosen: its score and its share, both sorted with their places (8 bytes), a
# running sum, the choice.
_BYTES_PER_SCORE = 40


class HeadGroup(NamedTuple):
    """Heads of one kind.

    Attributes:
        patterns: One a head.
        heads: Their numbers among the slab's heads, int64, on the device; None where they are all of them.
    """

    patterns: tuple[DynamicPattern, ...]
    heads: torch.Tensor | None


class Slab(NamedTuple):
    """Heads that are done at once.

    Attributes:
        first_kv_head: First KV head, on this device.
        num_kv_heads: KV heads.
        groups: Their query heads, by kind.
    """

    first_kv_head: int
    num_kv_heads: int
    groups: list[HeadGroup]


class LayerPatterns:
    """The patterns of a layer's query heads on this device, grouped into what is selected together."""

    def __init__(self, patterns: Sequence[DynamicPattern], *, num_kv_heads: int, device: torch.device) -> None:
        """Groups the heads.

        Args:
            patterns: One a query head.
            num_kv_heads: KV heads on this device.
            device: The layer's.
        """
        self.num_heads, self.num_kv_heads = len(patterns), num_kv_heads
        self.block_size = patterns[0].block_size
        self._patterns = tuple(patterns)
        self._uniform = len({pattern.kind for pattern in patterns}) == 1
        self._device = device
        self.last_rows = max(pattern.last_rows for pattern in patterns)
        # Compiled for this layer's tensors, by what the index lists.
        self.variants: dict[tuple[bool, bool], Any] = {}

    def index_kinds(self) -> set[tuple[bool, bool]]:
        """Whether an index of some slab has columns, and a band, in every combination that may come."""
        kinds = set()
        for _, _, groups in self._slabs(1):
            heads = {type(pattern) for group in groups for pattern in group.patterns}
            has_band = any(pattern.has_band for pattern in heads)
            kinds |= {(any(pattern.has_columns for pattern in heads), has_band), (False, has_band)}
        return kinds

    def slabs(
        self, bytes_per_kv_head: int, num_scores: int, *, max_key_bytes: int, max_choice_bytes: int
    ) -> list[Slab]:
        """What is done at once: many heads of one kind, or a KV head whose heads differ.

        Args:
            bytes_per_kv_head: Its keys and values, gathered.
            num_scores: Tiles times key blocks of a query head.
            max_key_bytes: Of keys and values at once; one KV head's at least.
            max_choice_bytes: Of scores and ranks of key blocks at once, likewise.
        """
        choice = num_scores * _BYTES_PER_SCORE * self.num_heads // self.num_kv_heads
        fit = min(max_key_bytes // bytes_per_kv_head, max_choice_bytes // choice)
        fit = max(1, fit) if self._uniform else 1
        return self._slabs(min(fit, self.num_kv_heads))

    @functools.cache  # noqa: B019  One entry for each of a few sizes, as long as the model lives.
    def _slabs(self, size: int) -> list[Slab]:
        group = self.num_heads // self.num_kv_heads
        slabs = []
        for first in range(0, self.num_kv_heads, size):
            count = min(size, self.num_kv_heads - first)
            kinds: dict[object, list[int]] = {}
            heads = self._patterns[first * group : (first + count) * group]
            for number, pattern in enumerate(heads):
                kinds.setdefault(pattern.kind, []).append(number)
            # A copy from the host waits for the device: none in slabs of a size that no warm-up has seen.
            groups = [
                HeadGroup(
                    tuple(heads[number] for number in numbers),
                    None if len(kinds) == 1 else torch.tensor(numbers, device=self._device),
                )
                for numbers in kinds.values()
            ]
            slabs.append(Slab(first, count, groups))
        return slabs
