"""Models some of whose layers have no attention over a KV cache: linear attention, state spaces, convolutions."""

from __future__ import annotations

from tests.families.family import LLAMA, Family, layers, toy

LINEAR, FULL = "linear_attention", "full_attention"

# vLLM computes the linear layers of CPUs in bfloat16 only, with heads of 128. All experts are used: in that precision a
# router's near ties fall either way.
FAMILIES = [
    Family(
        "Qwen3-Next",
        "Qwen/Qwen3-Next-80B-A3B-Instruct",
        toy(
            "Qwen3NextForCausalLM",
            "qwen3_next",
            "pad_token_id",
            **{**LLAMA, "num_hidden_layers": 8, "rms_norm_eps": 1e-06, "rope_theta": 10000000},
            decoder_sparse_step=1,
            full_attention_interval=4,
            head_dim=64,
            linear_conv_kernel_dim=4,
            linear_key_head_dim=128,
            linear_num_key_heads=2,
            linear_num_value_heads=4,
            linear_value_head_dim=128,
            mlp_only_layers=[],
            moe_intermediate_size=64,
            norm_topk_prob=True,
            num_experts=4,
            num_experts_per_tok=4,
            output_router_logits=False,
            partial_rotary_factor=0.25,
            rope_scaling=None,
            router_aux_loss_coef=0.001,
            shared_expert_intermediate_size=64,
        ),
        sparse=layers(3, 7),
        stock=dict.fromkeys((0, 1, 2, 4, 5, 6), "no_attention"),
        engine={"dtype": "bfloat16"},
        std=0.03,
        attention_std=0.2,
        feature="linear layers",
    ),
]
