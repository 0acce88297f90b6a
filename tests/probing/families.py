"""Toy models of the families that transformers knows, by their type: four layers, random weights drawn large."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

NUM_LAYERS = 4
WINDOW = 20
# Whatever a family calls a size; those that it doesn't know are left out.
_SIZES: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "n_embd", "d_model"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size"), 96),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("shared_intermediate_size", "moe_shared_expert_intermediate_size"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"), NUM_LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads"), 4),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx"), 512),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace"), 1),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "mamba_d_head", "mamba_head_dim", "mamba_headdim"), 16),
    **dict.fromkeys(("mamba_chunk_size", "chunk_size"), 16),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads", "n_mamba_heads", "mamba_dt_rank", "rotary_dim"), 8),
    **dict.fromkeys(("mamba_n_groups", "mamba_ngroups", "n_groups"), 1),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "qk_nope_head_dim", "v_head_dim"), 16),
    "vocab_size": 100,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,
    "num_experts_per_tok": 2,
    "sliding_window": WINDOW,
    "attention_chunk_size": 24,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "mamba_d_ssm": 128,
    "mamba_expand": 2,
    "mamba_d_conv": 4,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
}
# Layers 1 and 3 see all keys, in families of two kinds of layers.
_LINEAR = ["linear_attention", "full_attention"] * 2
_SLIDING = ["sliding_attention", "full_attention"] * 2
_SHARED = {
    "layer_types": _SLIDING,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 100,
}
_GEMMA4 = {**_SHARED, "head_dim": 16, "global_head_dim": 32, "num_global_key_value_heads": 1}
_HYBRID = {"layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 32, "attention_hidden_size": 128}
_OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 3]},
    "gemma3n_text": {
        **_SHARED,
        "num_kv_shared_layers": 2,
        "intermediate_size": [96] * 4,
        "activation_sparsity_pattern": [0.0] * 4,
        "altup_num_inputs": 2,
        "laurel_rank": 8,
    },
    "gemma4_text": {**_GEMMA4, "num_kv_shared_layers": 2},
    "gemma4_unified_text": {**_GEMMA4, "num_kv_shared_layers": 0},
    "granitemoehybrid": {"layer_types": _LINEAR},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    # With a window all of its attention layers would have it.
    "minimax": {"sliding_window": None},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "full_attention"],
        "hybrid_override_pattern": None,
        "moe_latent_size": None,
    },
    "zamba": {**_HYBRID, "num_key_value_heads": 4, "attn_layer_period": 2, "attn_layer_offset": 1, "n_mamba_heads": 2},
    "zamba2": {
        **_HYBRID,
        "hybrid_layer_ids": [1, 3],
        "adapter_rank": 8,
        "num_mem_blocks": 1,
        "num_key_value_heads": 4,
        "head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def config_of(family: str, **changes: Any) -> Any:
    """A toy configuration.

    Args:
        family: ``model_type`` of a text model.
        changes: Of values.
    """
    kind = CONFIG_MAPPING[family]
    plain, own = kind(), {**_OWN.get(family, {}), **changes}
    values = {name: value for name, value in _SIZES.items() if _has(plain, name)} | own
    kinds = list(dict.fromkeys(getattr(plain, "layer_types", None) or ()))
    if len(kinds) > 1 and family not in _OWN:
        values.setdefault("layer_types", kinds[:2] * 2)
    if "kv_lora_rank" in values:
        values.pop("head_dim", None)
        values["num_key_value_heads"] = 4
    while True:
        try:
            return kind(**values)
        except AttributeError as error:
            # Computed of others.
            found = re.match(r"property '(\w+)'", str(error))
            if found is None:
                raise
            del values[found[1]]


def _has(config: Any, name: str) -> bool:
    try:
        return hasattr(config, name)
    except RuntimeError:
        # Another value a layer.
        return True


def toy(config: Any) -> Any:
    """A random model, fp32, with transformers' plain attention and experts."""
    torch.manual_seed(0)
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_config(config, **plain).float().eval()


_VISION = {
    **dict.fromkeys(
        ("hidden_size", "embed_dim", "vision_output_dim", "projector_input_dim", "projector_output_dim"), 32
    ),
    **dict.fromkeys(("num_hidden_layers", "depth", "num_attention_heads", "num_heads"), 2),
    "intermediate_size": 48,
    "image_size": 28,
    "patch_size": 14,
    "out_hidden_size": 64,
    "fullatt_block_indexes": [1],
}


def seeing(family: str, **changes: Any) -> Any:
    """A toy configuration of a family that sees images.

    Args:
        family: ``model_type`` of the whole model.
        changes: Of values of its text part.
    """
    kind = CONFIG_MAPPING[family]
    plain = kind()
    text = plain.get_text_config()
    key = next(name for name in kind.sub_configs if getattr(plain, name) is text)
    config = kind(**{key: config_of(text.model_type, **changes).to_dict()})
    for name in set(kind.sub_configs) - {key}:
        part = getattr(config, name)
        for size, value in _VISION.items():
            if hasattr(part, size):
                setattr(part, size, value)
    return config
