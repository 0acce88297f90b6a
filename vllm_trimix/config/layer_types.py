"""What a Hugging Face ``layer_types`` entry says of a layer."""

from __future__ import annotations

NO_ATTENTION = "no_attention"

_NO_ATTENTION_WORDS = ("linear", "conv", "mamba", "moe", "mlp", "recurrent")


def type_reason(kind: str) -> str | None:
    """Why a layer of this ``layer_types`` entry stays stock, or None."""
    if "sliding" in kind:
        return "sliding_window"
    if "chunked" in kind:
        return "chunked_attention"
    return NO_ATTENTION if any(word in kind for word in _NO_ATTENTION_WORDS) else None
