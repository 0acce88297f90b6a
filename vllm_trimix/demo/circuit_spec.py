"""The shape of a circuit model, validated; free of torch, so that a command line can read its defaults."""

from __future__ import annotations

import math
from dataclasses import dataclass

PREVIOUS_TOKEN_LAYER = 0
DTYPES = ("bfloat16", "float32")


@dataclass(frozen=True, kw_only=True)
class CircuitSpec:
    """Depths and widths of a circuit model; none of them changes what it answers.

    Attributes:
        layers: Decoder layers. Those without a part in the circuit write nothing that is read.
        lookup_layer: Reads the record from the alias's row: the one layer that needs the Middle Q-K section.
        answer_layer: Reads the statement from the question's last row.
        heads: Query heads.
        kv_heads: Key-value heads. The two previous-token heads share one, hence heads >= 2 * kv_heads.
        sharpness: Scale on all attention scores. 0.35 still answers at 16K tokens, 0.2 at 4K; 0.15 doesn't answer.
        distractor_heads: Heads of each idle layer that attend to something without effect on the answer.
        dtype: Of the stored weights, ``bfloat16`` or ``float32``.
    """

    layers: int = 8
    lookup_layer: int = 3
    answer_layer: int = 6
    heads: int = 8
    kv_heads: int = 2
    sharpness: float = 1.0
    distractor_heads: int = 0
    dtype: str = "bfloat16"

    def __post_init__(self) -> None:
        """Raises ValueError, naming the value, the limit and the fix."""
        if self.layers < 3:
            raise ValueError(f"layers: {self.layers} is too few; the circuit needs at least 3 layers")
        if not PREVIOUS_TOKEN_LAYER + 1 < self.answer_layer < self.layers:
            raise ValueError(
                f"answer_layer: {self.answer_layer} is outside 2-{self.layers - 1}, which leaves the lookup a layer "
                f"before it in a model of {self.layers} layers; choose {self.layers - 1}"
            )
        if not PREVIOUS_TOKEN_LAYER < self.lookup_layer < self.answer_layer:
            raise ValueError(
                f"lookup_layer: {self.lookup_layer} is not between the previous-token layer ({PREVIOUS_TOKEN_LAYER}) "
                f"and the answer layer ({self.answer_layer}); choose 1-{self.answer_layer - 1}"
            )
        if self.kv_heads < 1:
            raise ValueError(f"kv_heads: {self.kv_heads} is too few; choose at least 1")
        if self.heads < 2 * self.kv_heads or self.heads % self.kv_heads:
            raise ValueError(
                f"heads: {self.heads} is not a multiple of kv_heads ({self.kv_heads}) of at least {2 * self.kv_heads}, "
                f"as the two previous-token heads share one KV head; choose e.g. {4 * self.kv_heads}"
            )
        if not (math.isfinite(self.sharpness) and self.sharpness > 0):
            raise ValueError(f"sharpness: {self.sharpness} is not a positive number; 1.0 is sharp, 0.35 soft")
        if not 0 <= self.distractor_heads <= self.heads:
            raise ValueError(
                f"distractor_heads: {self.distractor_heads} is outside 0-{self.heads}, the heads of a layer"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: {self.dtype!r} is not supported; choose {' or '.join(DTYPES)}")

    @property
    def idle_layers(self) -> tuple[int, ...]:
        """Layers without a part in the circuit."""
        busy = (PREVIOUS_TOKEN_LAYER, self.lookup_layer, self.answer_layer)
        return tuple(layer for layer in range(self.layers) if layer not in busy)
