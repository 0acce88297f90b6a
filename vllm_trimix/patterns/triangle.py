"""TriangleMix's deep-layer pattern: sink keys, a local window, dense last rows.

Source: TriangleMix (arXiv 2507.21526), "Triangle" = Streaming + Last Q-K sections.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Triangle:
    """Parameters of the triangle pattern, in tokens.

    Attributes:
        n_init: Sink keys ``[0, n_init)`` that every query sees.
        n_local: Trailing window, counting the query's own position.
        last_n: Trailing prompt rows that stay dense.
    """

    n_init: int = 8
    n_local: int = 512
    last_n: int = 128

    def mask(self, q_positions: torch.Tensor, k_positions: torch.Tensor, prompt_len: int) -> torch.Tensor:
        """Visibility of keys, the definition every kernel is tested against.

        Args:
            q_positions: Absolute query positions, [num_queries], integer.
            k_positions: Absolute key positions, [num_keys], integer.
            prompt_len: Prompt tokens as first submitted; rows at or past ``prompt_len - last_n`` are dense.

        Returns:
            Boolean [num_queries, num_keys], True where the key is visible.
        """
        i, j = q_positions[:, None], k_positions[None, :]
        return (j <= i) & ((j < self.n_init) | (i - j < self.n_local) | (i >= prompt_len - self.last_n))

    def visible_pairs(self, prompt_len: int) -> int:
        """Visible (query, key) pairs of one head over a whole prompt; dense attention has P (P + 1) / 2."""
        body = max(0, prompt_len - self.last_n)
        window = self.n_init + self.n_local
        growing = min(body, window)
        streaming = growing * (growing + 1) // 2 + (body - growing) * window
        return streaming + (prompt_len * (prompt_len + 1) - body * (body + 1)) // 2

    @property
    def dense_len(self) -> int:
        """Longest prompt, in tokens, on which the pattern hides nothing."""
        return self.n_init + self.n_local + self.last_n

    def is_dense(self, prompt_len: int) -> bool:
        """Whether no query of a prompt of this length has a hidden key."""
        return prompt_len <= self.dense_len
