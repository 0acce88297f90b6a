"""What a Hugging Face ``layer_types`` entry says of a layer."""

from __future__ import annotations

_NO_ATTENTION = ("linear", "conv", "mamba", "moe", "mlp", "recurrent")


def type_reason(kind: str) -> str | None:
    """Why a layer of this ``layer_types`` entry stays stock, or None."""
    if "sliding" in kind:
        return "sliding_window"
    if "chunked" in kind:
        return "chunked_attention"
    if any(word in kind for word in _NO_ATTENTION):
        return "no_attention"
    return None
