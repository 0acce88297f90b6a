"""Tells the layers of a KV-cache group which of them are sparse, and how."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.model_executor.models.utils import extract_layer_index

from vllm_trimix.backend import announce, settings
from vllm_trimix.backend.dynamic.layer_patterns import LayerPatterns
from vllm_trimix.config.entry import Resolved


def bind_layers(
    layer_names: list[str],
    vllm_config: Any,
    resolved: Resolved,
    *,
    dense: str,
    kernel: str,
    stock_reason: str | None,
    device: torch.device,
) -> list[Any]:
    """Tells each layer's implementation what it is, and announces it.

    Args:
        layer_names: Of the group.
        vllm_config: vLLM's.
        resolved: Ours.
        dense: Name of the dense backend.
        kernel: ``torch_cpu`` or ``triton``.
        stock_reason: Why all of them stay stock, or None.
        device: Where they run.

    Returns:
        Those implementations that are ours.
    """
    context = vllm_config.compilation_config.static_forward_context
    impls, stock = [], {}
    sparse = {*resolved.layers, *(resolved.shallow.layers if resolved.shallow is not None else ())}
    for name in layer_names:
        impl: Any = getattr(context[name], "impl", None)
        if not hasattr(impl, "trimix_active"):
            continue
        layer = extract_layer_index(name)
        if layer in sparse:
            reason = stock_reason or impl.trimix_dense_reason or _scales_reason(context[name])
            if reason is not None:
                stock[layer] = reason
            elif layer in resolved.layers:
                impl.trimix_active = True
            else:
                impl.trimix_dynamic = _layer_patterns(impl, layer, vllm_config, resolved, device)
        impls.append(impl)
    if impls:
        # Such layers are in KV-cache groups of their own, and other pipeline stages are other processes.
        known = settings.ineligible_layers(vllm_config.model_config)
        stock |= {layer: reason for layer, reason in known.items() if layer in sparse}
        announce.start_line(vllm_config, resolved, dense=dense, kernel=kernel, stock=stock)
    return impls


def _layer_patterns(impl: Any, layer: int, vllm_config: Any, resolved: Resolved, device: torch.device) -> LayerPatterns:
    assert resolved.shallow is not None
    rank = get_tensor_model_parallel_rank() if vllm_config.parallel_config.tensor_parallel_size > 1 else 0
    heads = resolved.shallow.heads_of(layer, rank * impl.num_heads, impl.num_heads)
    return LayerPatterns(heads, num_kv_heads=impl.num_kv_heads, device=device)


def _scales_reason(layer: Any) -> str | None:
    """Why this layer's loaded fp8 scales keep it stock, or None."""
    scales = (getattr(layer, name, None) for name in ("_q_scale", "_k_scale", "_v_scale"))
    return "per_head_kv_scales" if any(scale is not None and scale.numel() != 1 for scale in scales) else None
