"""TriangleMix for Hugging Face transformers: the same mask as the vLLM backend, as an attention function.

    from vllm_trimix.hf_attention import use_triangle

    use_triangle(model, starting_layer=16)
    model.generate(**tokenizer(prompt, return_tensors="pt"))

Needs torch and transformers only. Memory is linear in the prompt; the band costs O(N) in the layers of the set.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from vllm_trimix.config.resolve import resolve
from vllm_trimix.patterns.triangle import Triangle

NAME = "vllm_trimix"
BLOCK_ROWS = 256
"""Query rows that are computed at once: memory is this many times the keys."""

Attend = Callable[..., torch.Tensor]


@dataclass
class TriangleAttention:
    """What a model's attention layers do; its fields may be changed between forward passes.

    Attributes:
        layers: Triangle layers, indices. Layers with a sliding window of their own stay as they are.
        pattern: The triangle's parameters.
        prompt_len: Prompt tokens; None takes the length of the forward pass that starts the sequence.
        attend: What computes a layer instead, for research: same arguments as ``attend``, plus ``layer``.
        model: The model, weakly.
    """

    layers: frozenset[int]
    pattern: Triangle
    prompt_len: int | None = None
    attend: Attend | None = None
    model: Any = None
    _previous: str = ""
    _current_len: int = field(default=0, repr=False)

    def remove(self) -> None:
        """Gives the model its own attention back."""
        model = self.model()
        if model is not None:
            model.set_attn_implementation(self._previous)
            for module in attention_modules(model):
                del module.trimix

    def prompt_len_of(self, rows: int, keys: int) -> int:
        """Prompt tokens of the sequence that a forward pass of these rows belongs to."""
        if rows == keys:
            self._current_len = rows
        return self._current_len if self.prompt_len is None else self.prompt_len


def use_triangle(
    model: Any,
    *,
    starting_layer: int | None = None,
    layers: str | Iterable[int] | None = None,
    preset: str | None = None,
    n_init: int | None = None,
    n_local: int | None = None,
    last_n: int | None = None,
) -> TriangleAttention:
    """Makes a causal language model of transformers prefill with the triangle in the given layers.

    Without layers and preset, a shipped preset for this model's id is taken. Decoding stays dense. The prompt
    must be prefilled in one forward pass, without padding; a batch holds prompts of one length.

    Args:
        model: Any model whose attention goes through transformers' ``AttentionInterface``.
        starting_layer: First triangle layer; short for ``layers="N-<last>"``.
        layers: Triangle layers, ``"5,7,10,15-35"`` or indices.
        preset: A shipped preset, or a preset file.
        n_init: Sink keys, in tokens; default of the preset or 8.
        n_local: Window, in tokens, counting the query itself; default of the preset or 512.
        last_n: Dense last prompt rows; default of the preset or 128.

    Returns:
        The settings; ``remove()`` undoes the call.

    Raises:
        ValueError: Bad layers or parameters, no preset, or a model whose attention can't be replaced.
    """
    entry = {
        "starting_layer": starting_layer,
        "layers": layers if layers is None or isinstance(layers, str) else list(layers),
        "preset": preset,
        "n_init": n_init,
        "n_local": n_local,
        "last_n": last_n,
    }
    text = model.config.get_text_config()
    resolved = resolve(
        {key: value for key, value in entry.items() if value is not None},
        model=model.config.name_or_path,
        num_layers=text.num_hidden_layers,
        model_entry=getattr(model.config, "trimix", None),
        text_config=text,
    )
    return install(model, layers=resolved.layers, pattern=resolved.triangle)


def install(model: Any, *, layers: Iterable[int], pattern: Triangle) -> TriangleAttention:
    """``use_triangle`` with everything decided."""
    # Heavy.
    from transformers import AttentionInterface, AttentionMaskInterface

    num_layers = model.config.get_text_config().num_hidden_layers
    settings = TriangleAttention(
        frozenset(layers),
        pattern,
        model=weakref.ref(model),
        _previous=model.config._attn_implementation,
    )
    modules = attention_modules(model)
    if len(modules) != num_layers or not model._can_set_attn_implementation():
        raise ValueError(
            f"{type(model).__name__}: its attention can't be replaced ({len(modules)} of {num_layers} layers have a "
            "layer_idx and go through transformers' AttentionInterface); it needs a model that supports "
            "attn_implementation"
        )
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, _refuse_padding)
    model.set_attn_implementation(NAME)
    for module in modules:
        module.trimix = settings
    return settings


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    pattern: Triangle | None,
    prompt_len: int,
    scale: float,
    soft_cap: float = 0.0,
    sliding_window: int | None = None,
) -> torch.Tensor:
    """Attention of the last rows of a sequence under the rule, exact, in blocks of rows.

    Args:
        q: Queries, [batch, num_heads, num_rows, head_size].
        k: Keys, [batch, num_kv_heads, num_keys, head_size]; the rows are the last of the ``num_keys`` positions.
        v: Values, like ``k``.
        pattern: The triangle, or None for dense rows.
        prompt_len: Prompt tokens, for the triangle's last rows.
        scale: Softmax scale.
        soft_cap: Logits become ``soft_cap * tanh(logit / soft_cap)``; 0 is off.
        sliding_window: Keys that a row sees, counting itself, where the layer has a window of its own.

    Returns:
        Like ``q``.
    """
    num_rows, num_keys = q.shape[2], k.shape[2]
    first = num_keys - num_rows
    if pattern is None and num_rows == num_keys and not soft_cap and sliding_window is None:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    out = torch.empty_like(q)
    body = 0 if pattern is None else min(max(0, prompt_len - pattern.last_n - first), num_rows)
    for start, stop in _blocks(0, body):
        assert pattern is not None
        block_keys = _band_keys(pattern, first + start, first + stop, q.device)
        visible = pattern.mask(_rows(first + start, first + stop, q.device), block_keys, prompt_len)
        block_k, block_v = (x.index_select(2, block_keys) for x in (k, v))
        out[:, :, start:stop] = _attend_block(q[:, :, start:stop], block_k, block_v, visible, scale, soft_cap)
    for start, stop in _blocks(body, num_rows):
        visible = dense_mask(first + start, first + stop, sliding_window, q.device)
        block_k, block_v = (x[:, :, : first + stop] for x in (k, v))
        out[:, :, start:stop] = _attend_block(q[:, :, start:stop], block_k, block_v, visible, scale, soft_cap)
    return out


def dense_mask(start: int, stop: int, sliding_window: int | None, device: torch.device) -> torch.Tensor:
    """Visibility of the keys [0, stop) for the rows [start, stop): bool [stop - start, stop]."""
    rows, keys = _rows(start, stop, device)[:, None], torch.arange(stop, device=device)
    visible = keys <= rows
    return visible if sliding_window is None else visible & (rows - keys < sliding_window)


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Registered with ``AttentionInterface``: [batch, heads, rows, head_size] to [batch, rows, heads, head_size]."""
    settings: TriangleAttention = module.trimix
    if attention_mask is not None or kwargs.get("s_aux") is not None:
        raise ValueError(f"layer {module.layer_idx}: masks of one's own and learned sinks are not supported")
    out = (settings.attend or _attend_layer)(
        query,
        key,
        value,
        layer=module.layer_idx,
        # A layer with a window of its own stays as it is, as in vLLM.
        pattern=settings.pattern if module.layer_idx in settings.layers and sliding_window is None else None,
        prompt_len=settings.prompt_len_of(query.shape[2], key.shape[2]),
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        soft_cap=softcap or 0.0,
        sliding_window=sliding_window,
    )
    return out.transpose(1, 2).contiguous(), None


def _attend_layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, **rule: Any) -> torch.Tensor:
    return attend(q, k, v, **rule)


def _refuse_padding(*, attention_mask: torch.Tensor | None = None, **_: Any) -> None:
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError("attention_mask hides tokens: padded batches are not supported; pass prompts of one length")


def attention_modules(model: Any) -> list[Any]:
    """The attention module of each layer: transformers gives it its layer's index and the softmax scale."""
    return [module for module in model.modules() if hasattr(module, "layer_idx") and hasattr(module, "scaling")]


def _blocks(begin: int, end: int) -> list[tuple[int, int]]:
    return [(start, min(start + BLOCK_ROWS, end)) for start in range(begin, end, BLOCK_ROWS)]


def _rows(start: int, stop: int, device: torch.device) -> torch.Tensor:
    return torch.arange(start, stop, device=device)


def _band_keys(pattern: Triangle, start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Keys that some row of [start, stop) sees: sinks and window, each once."""
    window = max(0, start - pattern.n_local + 1)
    sinks = min(pattern.n_init, window)
    return torch.cat([torch.arange(sinks, device=device), torch.arange(window, stop, device=device)])


def _attend_block(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, visible: torch.Tensor, scale: float, soft_cap: float
) -> torch.Tensor:
    if not soft_cap:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scale, enable_gqa=True)
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, dim=1) for x in (k, v))
    logits = soft_cap * torch.tanh((q @ k.transpose(2, 3)).float() * (scale / soft_cap))
    return torch.softmax(logits.masked_fill(~visible, float("-inf")), dim=-1).to(v.dtype) @ v
