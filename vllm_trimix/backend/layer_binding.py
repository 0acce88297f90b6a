"""Tells the layers of a KV-cache group which of them are sparse, and how."""

from __future__ import annotations

from typing import Any

import torch
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank

from vllm_trimix.backend import announce
from vllm_trimix.backend.dynamic.layer_patterns import LayerPatterns
from vllm_trimix.backend.survey import Survey, numbering, stock_reason, survey
from vllm_trimix.config.entry import Resolved


def bind_layers(
    layer_names: list[str],
    vllm_config: Any,
    resolved: Resolved,
    *,
    dense: str,
    kernel: str,
    device: torch.device,
) -> tuple[list[Any], Survey]:
    """Tells each layer's implementation what it is, and announces it.

    Args:
        layer_names: Of the group.
        vllm_config: vLLM's.
        resolved: Ours.
        dense: Name of the dense backend.
        kernel: ``torch_cpu`` or ``triton``.
        device: Where they run.

    Returns:
        Those implementations that are ours, and what all layers of this stage are.
    """
    context = vllm_config.compilation_config.static_forward_context
    impls = []
    shallow = () if resolved.shallow is None else resolved.shallow.layers
    layer_of = numbering(vllm_config.model_config)
    for name in layer_names:
        impl: Any = getattr(context[name], "impl", None)
        if not hasattr(impl, "trimix_active"):
            continue
        layer = layer_of(name)
        if layer in resolved.layers and stock_reason(context[name], vllm_config, resolved, dynamic=False) is None:
            impl.trimix_active = True
        elif layer in shallow and stock_reason(context[name], vllm_config, resolved, dynamic=True) is None:
            impl.trimix_dynamic = _layer_patterns(impl, layer, vllm_config, resolved, device)
        impls.append(impl)
    # Of all KV-cache groups, whichever is bound first.
    found = survey(vllm_config, resolved)
    if impls:
        announce.start(vllm_config, resolved, dense=dense, kernel=kernel, found=found)
    return impls, found


def _layer_patterns(impl: Any, layer: int, vllm_config: Any, resolved: Resolved, device: torch.device) -> LayerPatterns:
    assert resolved.shallow is not None
    rank = get_tensor_model_parallel_rank() if vllm_config.parallel_config.tensor_parallel_size > 1 else 0
    heads = resolved.shallow.heads_of(layer, rank * impl.num_heads, impl.num_heads)
    return LayerPatterns(heads, num_kv_heads=impl.num_kv_heads, device=device)
