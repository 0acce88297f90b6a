"""A model of transformers: its layers measured during a dense pass, and a choice of heads in place."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from vllm_trimix import hf_attention
from vllm_trimix.hf_attention import TriangleAttention
from vllm_trimix.hf_attention.layers import attention_layers, layer_heads
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.searching import selected
from vllm_trimix.searching.measure import Measured, measure, output_weight


@contextmanager
def _attention(model: Any, attend: Callable[..., torch.Tensor]) -> Iterator[TriangleAttention]:
    settings = hf_attention.install(model, layers=[], pattern=Triangle())
    settings.attend = attend
    try:
        yield settings
    finally:
        settings.remove()


def measure_prompt(
    model: Any,
    tokens: Sequence[int],
    *,
    candidates: Sequence[DynamicPattern],
    layers: Collection[int],
    last_n: int,
    chunk: int | None = None,
    done: Callable[[int, Measured], None],
) -> None:
    """Measures layers on a prompt, in one dense forward pass.

    Args:
        model: A causal language model of transformers, in evaluation mode.
        tokens: The prompt.
        candidates: Patterns.
        layers: Layers to measure.
        last_n: The prompt's last rows, which don't count.
        chunk: Tokens of a chunk; None: the whole prompt at once.
        done: Told each layer's result as soon as there is one.

    Raises:
        ValueError: The model's attention can't be replaced, or a layer wasn't reached.
    """
    weights, missing = output_weights(model), set(layers)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, **rule: Any) -> torch.Tensor:
        out = hf_attention.attend(q, k, v, **{**rule, "pattern": None})
        if layer in missing:
            missing.remove(layer)
            found = measure(
                q[0],
                k[0],
                v[0],
                out[0],
                candidates=candidates,
                num_sparse=q.shape[2] - last_n,
                chunk=chunk,
                rule=selected.Rule(rule["scale"], rule["soft_cap"]),
                weight=weights[layer],
            )
            done(layer, found)
        return out

    with _attention(model, attend), torch.no_grad():
        model(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=False, logits_to_keep=1)
    if missing:
        raise ValueError(f"{type(model).__name__}: not every layer's attention went through AttentionInterface")


def output_weights(model: Any) -> dict[int, torch.Tensor | None]:
    """Output projections of the layers with attention where they are plain matrices."""
    modules = attention_layers(model)
    found = {}
    for layer, module in modules.items():
        heads, size = layer_heads(model, layer)
        hidden = model.config.get_text_config().hidden_size
        found[layer] = output_weight(module, num_heads=heads, head_size=size, hidden_size=hidden)
    return found


@contextmanager
def use_heads(
    model: Any, heads: Mapping[int, Sequence[DynamicPattern]], *, last_n: int, prompt_len: int, chunk: int | None = None
) -> Iterator[None]:
    """A model that prefills prompts of this length with a pattern for each head of these layers.

    Args:
        model: A causal language model of transformers.
        heads: Layer -> a pattern for each query head.
        last_n: The prompt's last rows, which stay dense, as all rows after it do.
        prompt_len: Tokens of the prompt; what the forward pass holds beyond is an answer.
        chunk: Tokens of a chunk; None: the whole prompt at once.
    """

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, **rule: Any) -> torch.Tensor:
        out = hf_attention.attend(q, k, v, **{**rule, "pattern": None})
        if layer in heads and q.shape[2] == k.shape[2]:
            selected.attend(
                q[0, :, :prompt_len],
                k[0, :, :prompt_len],
                v[0, :, :prompt_len],
                heads[layer],
                num_sparse=prompt_len - last_n,
                chunk=chunk,
                rule=selected.Rule(rule["scale"], rule["soft_cap"]),
                out=out[0],
            )
        return out

    with _attention(model, attend):
        yield
