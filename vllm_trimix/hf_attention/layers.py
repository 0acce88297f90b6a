"""The layers of a model of transformers: which have attention, and why some of them stay as they are.

A layer's number is its place in the model's own list of layers, the one that ``layer_types`` and vLLM count by. It is
read from the place of the module and not from its ``layer_idx``: shared blocks don't know where they stand.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch.nn import ModuleList

from vllm_trimix.config.context import derived_length
from vllm_trimix.config.layer_types import type_reason
from vllm_trimix.config.layers import format_layers

NO_ATTENTION = "no_attention"


def num_layers(model: Any) -> int:
    """Layers of the model's text part.

    Raises:
        ValueError: Its configuration doesn't say.
    """
    found = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    if found is None:
        raise ValueError(
            f"{type(model).__name__}: its attention can't be replaced: its configuration has no num_hidden_layers"
        )
    return int(found)


def text_part(model: Any) -> Any:
    """The model of transformers that holds the layers of the text part; ``model`` itself where nothing is like one."""
    for part in (model.get_decoder(), model.base_model):
        if hasattr(part, "set_attn_implementation") and _layer_list(part, num_layers(model)) is not None:
            return part
    return model


def layer_list(model: Any) -> Any:
    """The module list that holds the layers of the model's text part; None where there is none of that length."""
    return _layer_list(text_part(model), num_layers(model))


def _layer_list(part: Any, length: int) -> Any:
    lists = [module for module in part.modules() if isinstance(module, ModuleList) and len(module) == length]
    # Experts and projections may be as many as layers. Without any attention it doesn't matter which it is.
    return next((found for found in lists if any(map(_uses_interface, found.modules()))), lists[0] if lists else None)


def attention_layers(model: Any) -> dict[int, Any]:
    """Each layer's attention module, for the layers that have one which goes through ``AttentionInterface``.

    Raises:
        ValueError: Layers whose attention isn't theirs alone: they can't be told apart.
    """
    found: dict[int, Any] = {}
    for layer, block in enumerate(layer_list(model) or ()):
        modules = [module for module in block.modules() if _uses_interface(module) and not _is_cross(module)]
        if len(modules) > 1 or any(module is other for module in modules for other in found.values()):
            raise ValueError(
                f"{type(model).__name__}: layer {layer} has {len(modules)} attention modules, or shares one with "
                "another layer; the triangle takes one a layer"
            )
        if modules:
            found[layer] = modules[0]
    return found


def layer_value(text: Any, layer: int, name: str, default: Any = None) -> Any:
    """A value of a text configuration for one layer: some families have another for each.

    Args:
        text: Of transformers.
        layer: Number.
        name: Of the value.
        default: Where there is none.
    """
    if getattr(text, "is_heterogeneous", False):
        text = text.per_layer_config[layer]
    value = getattr(text, name, default)
    return value[layer] if isinstance(value, list | tuple) and len(value) == text.num_hidden_layers else value


def layer_heads(model: Any, layer: int) -> tuple[int, int]:
    """Query heads of a layer with attention, and the size of their outputs."""
    module, text = attention_layers(model)[layer], model.config.get_text_config()
    heads = getattr(module, "num_heads", None) or layer_value(text, layer, "num_attention_heads")
    size = getattr(module, "v_head_dim", None) or getattr(module, "head_dim", None)
    return heads, size or layer_value(text, layer, "head_dim") or text.hidden_size // heads


def stock_layers(model: Any) -> dict[int, str]:
    """Layers that stay as they are by the model's own design, with the reason in the words of vLLM's start line."""
    text, modules = model.config.get_text_config(), attention_layers(model)
    reasons = {layer: _reason(modules.get(layer), text, layer) for layer in range(num_layers(model))}
    return {layer: reason for layer, reason in reasons.items() if reason is not None}


def describe(stock: dict[int, str]) -> str:
    """Stock layers by reason, e.g. ``0-2 no_attention, 3 sliding_window``."""
    return ", ".join(
        f"{format_layers([layer for layer in stock if stock[layer] == reason])} {reason}"
        for reason in dict.fromkeys(stock.values())
    )


def check_model(model: Any) -> dict[int, Any]:
    """The attention modules of a model whose attention can be replaced, by layer.

    Raises:
        ValueError: A model whose attention can't be replaced, or that has none, or MLA.
    """
    name, text = type(model).__name__, model.config.get_text_config()
    if _is_mla(text):
        raise ValueError(f"MLA models ({name}) are not supported, as in vLLM: their cache holds compressed keys")
    modules = attention_layers(model)
    if modules and model._can_set_attn_implementation():
        return modules
    kinds = getattr(text, "layer_types", None) or ()
    if not modules and kinds and all(type_reason(str(kind)) == NO_ATTENTION for kind in kinds):
        raise ValueError(f"{name} has no attention layers")
    raise ValueError(
        f"{name}: its attention can't be replaced: none of its {num_layers(model)} layers goes through transformers' "
        "AttentionInterface; it needs a model that supports attn_implementation"
    )


def _reason(module: Any, text: Any, layer: int) -> str | None:
    """Why a layer stays stock, or None."""
    kinds = getattr(text, "layer_types", None)
    kind = type_reason(str(kinds[layer])) if kinds else None
    if module is None or kind == NO_ATTENTION:
        return NO_ATTENTION
    if kind == "chunked_attention":
        return kind
    if (kind == "sliding_window" or not kinds) and has_window(text, layer):
        return "sliding_window"
    if any("sink" in name and parameter is not None for name, parameter in module.named_parameters(recurse=False)):
        return "learned_sinks"
    if "position_bias" in _arguments(module):
        return "position_bias"
    if not getattr(module, "is_causal", True):
        return "not_decoder"
    return "kv_sharing" if getattr(module, "is_kv_shared_layer", False) else None


def has_window(text: Any, layer: int) -> bool:
    """Whether a layer's window is shorter than the model's context; one that isn't hides nothing.

    Args:
        text: A text configuration of transformers.
        layer: A layer that takes its window from there.
    """
    window, context = layer_value(text, layer, "sliding_window"), derived_length(text)
    if not isinstance(window, int) or window < 1 or not getattr(text, "use_sliding_window", True):
        return False
    return context is None or window < context


def _is_mla(text: Any) -> bool:
    # MiniCPM3 compresses keys, but vLLM's cache holds them whole.
    compressed = getattr(text, "kv_lora_rank", None) is not None and text.model_type != "minicpm3"
    return compressed or hasattr(text, "compress_ratios")


def _arguments(module: Any) -> set[str]:
    """Names of what a module's forward pass gives by keyword."""
    constants = inspect.unwrap(type(module).forward).__code__.co_consts
    return {name for item in constants if isinstance(item, tuple) for name in item if isinstance(name, str)}


def _uses_interface(module: Any) -> bool:
    code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
    return code is not None and "ALL_ATTENTION_FUNCTIONS" in code.co_names


def _is_cross(module: Any) -> bool:
    return bool(getattr(module, "is_cross_attention", False)) or "Cross" in type(module).__name__
