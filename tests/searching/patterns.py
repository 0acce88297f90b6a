"""Patterns and inputs of awkward shapes for the search's tests."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.registry import make_pattern

_ENTRIES: dict[str, dict[str, Any]] = {
    "a_shape": {"pattern": "a_shape", "n_init": 3, "n_local": 70},
    "no_sinks": {"pattern": "a_shape", "n_init": 0, "n_local": 1, "block_size": 128},
    "vertical_slash": {"pattern": "vertical_slash", "vertical_size": 40, "slash_size": 110},
    "block_sparse": {"pattern": "block_sparse", "top_k": 2},
    "flexprefill": {"pattern": "flexprefill", "gamma": 0.6, "block_size": 64},
    "xattention": {"pattern": "xattention", "threshold": 0.3, "block_size": 128},
    "dense": {"pattern": "dense"},
}
PATTERNS: dict[str, DynamicPattern] = {name: make_pattern(entry, where="test") for name, entry in _ENTRIES.items()}


class Inputs(NamedTuple):
    """A layer's tensors for one prompt, fp32 unless said otherwise."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float


def inputs(*, tokens: int, heads: int = 4, kv_heads: int = 2, head_size: int = 16, seed: int = 0) -> Inputs:
    """Random queries, keys and values; a few keys stand out, so that choices differ between heads."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(heads, tokens, head_size, generator=generator)
    k = torch.randn(kv_heads, tokens, head_size, generator=generator)
    v = torch.randn(kv_heads, tokens, head_size, generator=generator)
    k[:, torch.randint(tokens, (tokens // 16 + 1,), generator=generator)] *= 3
    return Inputs(q, k, v, head_size**-0.5)
