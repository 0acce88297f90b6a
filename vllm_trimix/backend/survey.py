"""What each layer of a built model is: which can be sparse, and why the others stay stock.

The model itself is asked, after vLLM has built it: configurations say too little (learned sinks, soft caps, layers
without attention). The command ``doctor`` asks a model built without weights, so that it says what a server would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from vllm_trimix.backend import compat, settings
from vllm_trimix.config.entry import Resolved
from vllm_trimix.kernels import cpp_sparse


class Survey(NamedTuple):
    """What runs in the layers that were chosen.

    Attributes:
        sparse: Layers of this pipeline stage in which at least one attention is sparse.
        stock: Chosen layers that stay stock, with the reason.
        elsewhere: Chosen layers of other stages, which are other processes, that may be sparse for all that is known
            here.
    """

    sparse: frozenset[int]
    stock: dict[int, str]
    elsewhere: frozenset[int]

    def runs_any(self, layers: Iterable[int]) -> bool:
        """Whether some of these layers is sparse in this engine, as far as is known here."""
        return not self.sparse.union(self.elsewhere).isdisjoint(layers)


def survey(vllm_config: Any, resolved: Resolved) -> Survey:
    """Asks the model that was built under this configuration.

    Args:
        vllm_config: vLLM's, with the built model's layers in its forward context.
        resolved: Ours.
    """
    model_config = vllm_config.model_config
    shallow = () if resolved.shallow is None else resolved.shallow.layers
    reasons: dict[int, list[str | None]] = {}
    layer_of = numbering(model_config)
    for name, module in vllm_config.compilation_config.static_forward_context.items():
        if is_attention(module) and not name.startswith(compat.DRAFT_PREFIX):
            layer = layer_of(name)
            reasons.setdefault(layer, []).append(stock_reason(module, vllm_config, resolved, dynamic=layer in shallow))
    here = range(*model_config.get_layers_start_end_indices(vllm_config.parallel_config))
    known = settings.ineligible_layers(model_config)
    sparse, stock, elsewhere = set(), {}, set()
    for layer in sorted({*resolved.layers, *shallow}):
        found = reasons.get(layer, [])
        if None in found:
            sparse.add(layer)
        elif found:
            stock[layer] = str(found[0])
        elif layer in here:
            stock[layer] = "no_attention"
        elif layer in known:
            stock[layer] = known[layer]
        else:
            elsewhere.add(layer)
    return Survey(frozenset(sparse), stock, frozenset(elsewhere))


def is_attention(module: Any) -> bool:
    """Whether an entry of vLLM's forward context is attention over a KV cache."""
    return hasattr(module, "impl") and hasattr(module, "get_attn_backend")


def numbering(model_config: Any) -> Callable[[str], int]:
    """The number of the layer that an attention's name belongs to: the model's own, from 0; -1 if it has none."""
    return functools.partial(compat.layer_number, text_config=model_config.hf_text_config)


def stock_reason(module: Any, vllm_config: Any, resolved: Resolved, *, dynamic: bool) -> str | None:
    """Why an attention stays stock where it was chosen, or None.

    Args:
        module: vLLM's attention layer.
        vllm_config: vLLM's.
        resolved: Ours.
        dynamic: Whether it was chosen for a dynamic pattern, not for the triangle.
    """
    impl = module.impl
    if not hasattr(impl, "trimix_active"):
        return _foreign_reason(module)
    reason: str | None = impl.trimix_dense_reason or _wrapped_reason(module) or _scales_reason(module)
    if reason is None and dynamic:
        reason = _dynamic_reason(impl, impl.num_heads * vllm_config.parallel_config.tensor_parallel_size, resolved)
    return reason


def _foreign_reason(module: Any) -> str:
    """Why an attention isn't ours: its kind was given to another backend."""
    return "sliding_window" if getattr(module, "sliding_window", None) is not None else "other_backend"


def _wrapped_reason(module: Any) -> str | None:
    """vLLM wraps builders whose metadata it rewrites (chunked attention, static sinks): rows are not requests there."""
    return "wrapped_backend" if is_wrapped(module.get_attn_backend().get_builder_cls()) else None


def is_wrapped(builder_cls: type) -> bool:
    """Whether vLLM made a class of its own from one of our builders."""
    return "trimix_kernel" not in vars(builder_cls)


def _scales_reason(module: Any) -> str | None:
    """Why this layer's loaded fp8 scales keep it stock, or None."""
    scales = (getattr(module, name, None) for name in ("_q_scale", "_k_scale", "_v_scale"))
    return "per_head_kv_scales" if any(scale is not None and scale.numel() != 1 for scale in scales) else None


def _dynamic_reason(impl: Any, num_heads: int, resolved: Resolved) -> str | None:
    """Why no dynamic pattern can run in a layer of so many heads, on all devices, in which the triangle could."""
    if impl.trimix_kernel == "torch_cpu" and cpp_sparse.is_available() and not cpp_sparse.takes(impl.head_size):
        return "head_size"
    shallow = resolved.shallow
    if shallow is not None and shallow.heads and len(shallow.heads[0]) != num_heads:
        return "head_count"
    return None
