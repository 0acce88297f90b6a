"""TriangleMix for Hugging Face transformers: the same mask as the vLLM backend, as an attention function.

    from vllm_trimix.hf_attention import use_triangle

    use_triangle(model, starting_layer=16)
    model.generate(**tokenizer(prompt, return_tensors="pt"))

Needs torch and transformers only. Memory is linear in the prompt; the band costs O(N) in the layers of the set.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from vllm_trimix.config.layers import format_layers
from vllm_trimix.config.resolve import resolve
from vllm_trimix.hf_attention import layers as hf_layers
from vllm_trimix.hf_attention import stock as hf_stock
from vllm_trimix.hf_attention.layers import stock_layers
from vllm_trimix.hf_attention.stock import Visibility
from vllm_trimix.patterns.triangle import Triangle

__all__ = ["TriangleAttention", "attend", "dense_mask", "install", "stock_layers", "use_triangle"]

NAME = "vllm_trimix"
BLOCK_ROWS = 256
"""Query rows that are computed at once: memory is this many times the keys."""

Attend = Callable[..., torch.Tensor]


@dataclass
class TriangleAttention:
    """What a model's attention layers do; its fields may be changed between forward passes.

    Attributes:
        layers: Triangle layers, indices. Those in ``stock`` stay as they are.
        pattern: The triangle's parameters.
        stock: Layers that stay as they are by the model's own design, with the reason.
        prompt_len: Prompt tokens; None takes the length of the forward pass that starts the sequence.
        attend: What computes a layer instead, for research: same arguments as ``attend``, plus ``layer``. Stock layers
            don't come to it.
        model: The model, weakly.
    """

    layers: frozenset[int]
    pattern: Triangle
    stock: dict[int, str]
    prompt_len: int | None = None
    attend: Attend | None = None
    model: Any = None
    _previous: str = ""
    _current_len: int = field(default=0, repr=False)

    def remove(self) -> None:
        """Gives the model its own attention back."""
        model = self.model()
        if model is not None:
            hf_layers.text_part(model).set_attn_implementation(self._previous)
            for module in hf_layers.attention_layers(model).values():
                del module.trimix

    def prompt_len_of(self, rows: int, first: int) -> int:
        """Prompt tokens of the sequence that a forward pass of these rows, the first at this position, belongs to."""
        if first == 0:
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
    resolved = resolve(
        {key: value for key, value in entry.items() if value is not None},
        model=model.config.name_or_path,
        num_layers=hf_layers.num_layers(model),
        model_entry=getattr(model.config, "trimix", None),
        text_config=model.config.get_text_config(),
    )
    _check_layers(model, resolved.layers)
    return install(model, layers=resolved.layers, pattern=resolved.triangle)


def _check_layers(model: Any, layers: Iterable[int]) -> None:
    """Refuses a set in which no layer can be sparse, and names the layers of any other that stay stock."""
    hf_layers.check_model(model)
    known = stock_layers(model)
    stock = {layer: known[layer] for layer in layers if layer in known}
    if stock and len(stock) == len(set(layers)):
        able = [layer for layer in range(hf_layers.num_layers(model)) if layer not in known]
        raise ValueError(
            f"layers: {format_layers(stock)} all stay stock in {model.config.name_or_path or type(model).__name__} "
            f"({hf_layers.describe(stock)}); eligible: {format_layers(able)}"
        )
    if stock:
        warnings.warn(f"TRIMIX: stock_layers={hf_layers.describe(stock)}: these layers stay as they are", stacklevel=3)


def install(model: Any, *, layers: Iterable[int], pattern: Triangle) -> TriangleAttention:
    """``use_triangle`` with everything decided.

    Raises:
        ValueError: A model whose attention can't be replaced.
    """
    # Heavy.
    from transformers import AttentionInterface, AttentionMaskInterface

    modules, part = hf_layers.check_model(model), hf_layers.text_part(model)
    settings = TriangleAttention(
        frozenset(layers),
        pattern,
        stock_layers(model),
        model=weakref.ref(model),
        _previous=part.config._attn_implementation,
    )
    AttentionInterface.register(NAME, _forward)
    AttentionMaskInterface.register(NAME, hf_stock.visibility)
    # The text part alone: what sees images stays as it is.
    part.set_attn_implementation(NAME)
    for layer, module in modules.items():
        module.trimix = settings, layer
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
) -> torch.Tensor:
    """Attention of the last rows of a sequence under the rule, exact, in blocks of rows.

    Args:
        q: Queries, [batch, num_heads, num_rows, head_size].
        k: Keys, [batch, num_kv_heads, num_keys, head_size]; the rows are the last of the ``num_keys`` positions.
        v: Values, like ``k``; their heads may have another size.
        pattern: The triangle, or None for dense rows.
        prompt_len: Prompt tokens, for the triangle's last rows.
        scale: Softmax scale.
        soft_cap: Logits become ``soft_cap * tanh(logit / soft_cap)``; 0 is off.

    Returns:
        Like ``q``, with the values' head size.
    """
    num_rows, num_keys = q.shape[2], k.shape[2]
    first = num_keys - num_rows
    if pattern is None and num_rows == num_keys and not soft_cap:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    body = 0 if pattern is None else min(max(0, prompt_len - pattern.last_n - first), num_rows)
    for start, stop in _blocks(0, body):
        assert pattern is not None
        block_keys = _band_keys(pattern, first + start, first + stop, q.device)
        visible = pattern.mask(_rows(first + start, first + stop, q.device), block_keys, prompt_len)
        block_k, block_v = (x.index_select(2, block_keys) for x in (k, v))
        out[:, :, start:stop] = _attend_block(q[:, :, start:stop], block_k, block_v, visible, scale, soft_cap)
    for start, stop in _blocks(body, num_rows):
        visible = dense_mask(first + start, first + stop, q.device)
        block_k, block_v = (x[:, :, : first + stop] for x in (k, v))
        out[:, :, start:stop] = _attend_block(q[:, :, start:stop], block_k, block_v, visible, scale, soft_cap)
    return out


def dense_mask(start: int, stop: int, device: torch.device) -> torch.Tensor:
    """Causal visibility of the keys [0, stop) for the rows [start, stop): bool [stop - start, stop]."""
    return torch.arange(stop, device=device) <= _rows(start, stop, device)[:, None]


def _forward(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Registered with ``AttentionInterface``: [batch, heads, rows, head_size] to [batch, rows, heads, head_size]."""
    settings, layer = getattr(module, "trimix", (None, -1))
    rows, first = query.shape[2], key.shape[2] - query.shape[2]
    plain = attention_mask is None
    if isinstance(attention_mask, Visibility):
        first = attention_mask.first
        plain = attention_mask.is_causal
    plain = plain and kwargs.get("s_aux") is None
    if settings is None or layer in settings.stock or not plain:
        if settings is not None and layer not in settings.stock and (layer in settings.layers or settings.attend):
            raise ValueError(
                f"layer {layer}: it has learned sinks, or a mask that isn't plain causal (a window, images, a mask of "
                "one's own); leave it out of the layers"
            )
        given = {"scaling": scaling, "sliding_window": sliding_window, "softcap": softcap, **kwargs}
        given = {name: item for name, item in given.items() if item is not None}
        return hf_stock.forward(module, query, key, value, attention_mask, block_rows=BLOCK_ROWS, **given), None
    out = (settings.attend or _attend_layer)(
        query,
        # A static cache is longer than what it holds.
        key[:, :, : first + rows],
        value[:, :, : first + rows],
        layer=layer,
        pattern=settings.pattern if layer in settings.layers else None,
        prompt_len=settings.prompt_len_of(rows, first),
        scale=query.shape[3] ** -0.5 if scaling is None else scaling,
        soft_cap=softcap or 0.0,
    )
    return out.transpose(1, 2).contiguous(), None


def _attend_layer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *, layer: int, **rule: Any) -> torch.Tensor:
    return attend(q, k, v, **rule)


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
