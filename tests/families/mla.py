"""Models whose cache holds compressed keys (MLA): TRIMIX refuses them."""

from __future__ import annotations

from typing import Any

from tests.families.family import LLAMA, Family, toy

MLA = {
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 32,
    "num_key_value_heads": 4,
}
EXPERTS = {
    "attention_bias": False,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 64,
    "n_group": 1,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_group": 1,
    "topk_method": "noaux_tc",
}
SAYS = "does not support MLA models"


def refused(name: str, published: str, architecture: str, model_type: str, **keys: Any) -> Family:
    """An entry."""
    own_code = bool(keys.pop("own_code", False))
    config = toy(architecture, model_type, **{**LLAMA, **MLA, **EXPERTS, **keys})
    return Family(name, published, config, outcome="refused", words=SAYS, own_code=own_code)


FAMILIES = [
    refused(
        "DeepSeek V2",
        "deepseek-ai/DeepSeek-V2-Lite-Chat",
        "DeepseekV2ForCausalLM",
        "deepseek_v2",
        q_lora_rank=None,
        scoring_func="softmax",
        topk_method="greedy",
        routed_scaling_factor=1.0,
        norm_topk_prob=False,
        moe_layer_freq=1,
    ),
    refused(
        "DeepSeek V3 and R1",
        "deepseek-ai/DeepSeek-V3",
        "DeepseekV3ForCausalLM",
        "deepseek_v3",
        ep_size=1,
        moe_layer_freq=1,
        num_nextn_predict_layers=1,
    ),
    refused(
        "DeepSeek V3.2",
        "deepseek-ai/DeepSeek-V3.2-Exp",
        "DeepseekV32ForCausalLM",
        "deepseek_v32",
        ep_size=1,
        moe_layer_freq=1,
        index_head_dim=32,
        index_n_heads=4,
        index_topk=64,
    ),
    refused(
        "GLM-4.7 Flash",
        "zai-org/GLM-4.7-Flash",
        "Glm4MoeLiteForCausalLM",
        "glm4_moe_lite",
        num_nextn_predict_layers=1,
        partial_rotary_factor=1.0,
        rope_scaling=None,
    ),
    refused(
        "GLM-5",
        "zai-org/GLM-5",
        "GlmMoeDsaForCausalLM",
        "glm_moe_dsa",
        index_head_dim=32,
        index_n_heads=4,
        index_topk=64,
        moe_layer_freq=1,
    ),
    refused("A.X K1", "skt/A.X-K1", "AXK1ForCausalLM", "axk1", moe_layer_freq=1),
    refused(
        "LongCat Flash",
        "meituan-longcat/LongCat-Flash-Chat",
        "LongcatFlashForCausalLM",
        "longcat_flash",
        expert_ffn_hidden_size=64,
        ffn_hidden_size=256,
        mla_scale_kv_lora=True,
        mla_scale_q_lora=True,
        moe_topk=2,
        num_layers=4,
        zero_expert_num=2,
        zero_expert_type="identity",
    ),
    refused(
        "Kimi Linear",
        "moonshotai/Kimi-Linear-48B-A3B-Instruct",
        "KimiLinearForCausalLM",
        "kimi_linear",
        linear_attn_config={
            "full_attn_layers": [4],
            "head_dim": 32,
            "kda_layers": [1, 2, 3],
            "num_heads": 4,
            "short_conv_kernel_size": 4,
        },
        mla_use_nope=True,
        moe_layer_freq=1,
        moe_renormalize=True,
        moe_router_activation_func="sigmoid",
        num_experts=4,
        num_experts_per_token=2,
        num_shared_experts=1,
        use_grouped_topk=True,
    ),
    refused(
        "Mistral Large 3",
        "mistralai/Mistral-Large-3-675B-Instruct-2512",
        "MistralLarge3ForCausalLM",
        "deepseek_v3",
        moe_layer_freq=1,
    ),
    refused(
        "openPangu Ultra MoE",
        "FreedomIntelligence/openPangu-Ultra-MoE-718B-V1.1",
        "PanguUltraMoEForCausalLM",
        "pangu_ultra_moe",
        own_code=True,
        attention_kv_lora_dim=64,
        num_dense_layers=1,
    ),
    refused("Sarvam 105B", "sarvamai/sarvam-105b", "SarvamMLAForCausalLM", "sarvam_mla_moe", own_code=True),
]
