"""Models some of whose layers have no attention over a KV cache: linear attention, state spaces, convolutions."""

from __future__ import annotations

from typing import Any

from tests.families.family import FULL, LLAMA, THREE_LINEAR, Family, layers, toy, without_keys

EIGHT = {"num_hidden_layers": 8, "rms_norm_eps": 1e-06}
NO_ATTENTION_BUT_3_7 = dict.fromkeys((0, 1, 2, 4, 5, 6), "no_attention")

# vLLM computes the linear layers of CPUs in bfloat16 only, with heads of 128. All experts are used: in that precision a
# router's near ties fall either way.
BFLOAT16: dict[str, Any] = {"engine": {"dtype": "bfloat16"}, "std": 0.03, "attention_std": 0.2}
DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 128,
}
ALL_EXPERTS = {
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 4,
    "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 64,
}
QWEN_3_5 = {
    "attn_output_gate": True,
    "full_attention_interval": 4,
    "head_dim": 64,
    "layer_types": THREE_LINEAR,
    "mamba_ssm_dtype": "float32",
    "partial_rotary_factor": 0.25,
    "rope_parameters": {
        "mrope_interleaved": True,
        "mrope_section": [3, 3, 2],
        "partial_rotary_factor": 0.25,
        "rope_theta": 10000000,
        "rope_type": "default",
    },
}

FAMILIES = [
    Family(
        "Qwen3-Next",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        toy(
            "Qwen3NextForCausalLM",
            "qwen3_next",
            "pad_token_id",
            **{**LLAMA, **EIGHT, **DELTA_NET, **ALL_EXPERTS, "rope_theta": 10000000},
            decoder_sparse_step=1,
            full_attention_interval=4,
            head_dim=64,
            mlp_only_layers=[],
            norm_topk_prob=True,
            partial_rotary_factor=0.25,
            rope_scaling=None,
        ),
        sparse=layers(3, 7),
        stock=NO_ATTENTION_BUT_3_7,
        feature="linear layers",
        **BFLOAT16,
    ),
    Family(
        "Qwen3.5",
        "Qwen/Qwen3.5-9B",
        toy(
            "Qwen3_5ForCausalLM",
            "qwen3_5_text",
            "pad_token_id",
            **{**without_keys(LLAMA, "rope_theta"), **EIGHT, **DELTA_NET, **QWEN_3_5},
        ),
        outcome="stock_fails",
        words="No module named 'torchvision'",
        note="with torchvision: layers of full attention are sparse",
    ),
    Family(
        "Qwen3.5 MoE",
        "Qwen/Qwen3.5-35B-A3B",
        toy(
            "Qwen3_5MoeForCausalLM",
            "qwen3_5_moe_text",
            "pad_token_id",
            **{**without_keys(LLAMA, "rope_theta"), **EIGHT, **DELTA_NET, **QWEN_3_5, **ALL_EXPERTS},
        ),
        outcome="stock_fails",
        words="No module named 'torchvision'",
        note="with torchvision: layers of full attention are sparse",
    ),
    Family(
        "OLMo Hybrid",
        "allenai/Olmo-Hybrid-7B",
        toy(
            "OlmoHybridForCausalLM",
            "olmo_hybrid",
            **{**LLAMA, **EIGHT, **DELTA_NET, "num_key_value_heads": 4, "rope_theta": 500000},
            attention_bias=False,
            layer_types=THREE_LINEAR,
            linear_allow_neg_eigval=True,
        ),
        outcome="stock_fails",
        words="module 'triton' has no attribute 'set_allocator'",
        note="its linear layers need Triton",
    ),
    Family(
        "LFM2",
        "LiquidAI/LFM2-1.2B",
        toy(
            "Lfm2ForCausalLM",
            "lfm2",
            "intermediate_size",
            num_hidden_layers=8,
            block_auto_adjust_ff_dim=True,
            block_dim=128,
            block_ff_dim=256,
            block_ffn_dim_multiplier=1.0,
            block_mlp_init_scale=1.0,
            block_multiple_of=32,
            block_norm_eps=1e-05,
            block_out_init_scale=1.0,
            block_use_swiglu=True,
            block_use_xavier_init=True,
            conv_L_cache=3,
            conv_bias=False,
            conv_dim=128,
            conv_dim_out=128,
            conv_use_xavier_init=True,
            full_attn_idxs=[2, 5],
            initializer_range=0.02,
            norm_eps=1e-05,
            num_heads=4,
            rope_theta=1000000.0,
            use_cache=True,
            use_pos_enc=True,
        ),
        truth="stock vLLM's own answers aren't those of transformers",
        sparse=layers(2, 5),
        stock=dict.fromkeys((0, 1, 3, 4, 6, 7), "no_attention"),
    ),
    Family(
        "LFM2 MoE",
        "LiquidAI/LFM2-8B-A1B",
        toy(
            "Lfm2MoeForCausalLM",
            "lfm2_moe",
            num_hidden_layers=8,
            conv_L_cache=3,
            conv_bias=False,
            initializer_range=0.02,
            layer_types=["conv", "conv", FULL, "conv", "conv", FULL, "conv", "conv"],
            moe_intermediate_size=64,
            norm_eps=1e-05,
            norm_topk_prob=True,
            num_dense_layers=2,
            num_experts=4,
            num_experts_per_tok=2,
            rope_theta=1000000.0,
            routed_scaling_factor=1.0,
            use_cache=True,
            use_expert_bias=True,
        ),
        truth="stock vLLM's own answers aren't those of transformers",
        sparse=layers(2, 5),
        stock=dict.fromkeys((0, 1, 3, 4, 6, 7), "no_attention"),
    ),
]
