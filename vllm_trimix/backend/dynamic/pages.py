"""The interface of a layer's paged keys and values, as dynamic patterns read them: to choose, and to attend."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import torch

from vllm_trimix.kernels.sparse_index import Place, SparseIndex

Sums = Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""Of queries, [num_heads, num_rows, head_size], the column and the slash sums, fp32 [num_heads, num_keys] each."""


class Pages(abc.ABC):
    """A layer's paged keys and values, one implementation a device.

    Attributes:
        scale: Softmax scale.
    """

    scale: float

    @property
    @abc.abstractmethod
    def bytes_per_token(self) -> int:
        """Of one KV head, gathered."""

    @abc.abstractmethod
    def gather(self, request: int, num_keys: int, first_head: int, num_heads: int) -> Any:
        """Some KV heads' keys of a request.

        Args:
            request: Row of the block table.
            num_keys: Keys from the start of the prompt.
            first_head: First KV head, on this device.
            num_heads: KV heads.

        Returns:
            What ``attend`` takes, with the keys as ``.k``, [num_heads, num_keys, head_size].
        """

    def sums(self, request: int, num_keys: int, first_head: int, num_heads: int) -> Sums | None:
        """A kernel for the attention sums of the query heads of some KV heads, as ``gather``, or None."""
        return None

    def queries(self, q: torch.Tensor) -> torch.Tensor:
        """Queries, of any shape, as the patterns read them: dequantised."""
        return q

    @abc.abstractmethod
    def attend(
        self,
        q: torch.Tensor,
        gathered: Any,
        index: SparseIndex,
        place: Place,
        out: torch.Tensor,
        keys_read: torch.Tensor,
    ) -> None:
        """Attention over an index, into the rows and heads of ``out`` that it is for.

        Args:
            q: Queries of the step, [num_tokens, num_heads, head_size].
            gathered: From ``gather``.
            index: What each tile of each head reads.
            place: Where they lie in the step.
            out: Like ``q``; other rows and heads are left alone.
            keys_read: Keys loaded for each tile, int32 [heads of the index, num_tiles], written.
        """
