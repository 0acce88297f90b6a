"""Mixtures of experts whose layers all have plain attention."""

from __future__ import annotations

from tests.families.family import ALL_FOUR, LLAMA, Family, toy

FAMILIES = [
    Family(
        "Qwen3 MoE",
        "Qwen/Qwen3-30B-A3B",
        toy(
            "Qwen3MoeForCausalLM",
            "qwen3_moe",
            "pad_token_id",
            **{**LLAMA, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0},
            attention_bias=False,
            decoder_sparse_step=1,
            head_dim=32,
            max_window_layers=4,
            mlp_only_layers=[],
            moe_intermediate_size=64,
            norm_topk_prob=True,
            num_experts=4,
            num_experts_per_tok=2,
            output_router_logits=False,
            rope_scaling=None,
            router_aux_loss_coef=0.001,
            sliding_window=None,
            use_sliding_window=False,
        ),
        sparse=ALL_FOUR,
        feature="mixture of experts",
    ),
    Family(
        "Mixtral",
        "mistralai/Mixtral-8x7B-Instruct-v0.1",
        toy(
            "MixtralForCausalLM",
            "mixtral",
            "pad_token_id",
            **{**LLAMA, "rope_theta": 1000000.0},
            num_experts_per_tok=2,
            num_local_experts=4,
            output_router_logits=False,
            router_aux_loss_coef=0.02,
            sliding_window=None,
        ),
        sparse=ALL_FOUR,
    ),
]
