"""Which layers ablations draw from: those that the model's own design lets be triangle layers."""

from __future__ import annotations

from typing import Any

from transformers import Gemma3TextConfig, LlamaConfig

from vllm_trimix.cli import eval_choices

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 64,
}


def able(config: Any) -> list[int]:
    return eval_choices.able_layers(config, trust_remote_code=False)


def test_layers_with_a_window_are_left_out() -> None:
    kinds = ["full_attention" if layer in (2, 5) else "sliding_attention" for layer in range(6)]
    gemma = Gemma3TextConfig(num_hidden_layers=6, head_dim=16, layer_types=kinds, sliding_window=16, **SMALL)
    assert able(gemma) == [2, 5]
    assert able(LlamaConfig(num_hidden_layers=3, **SMALL)) == [0, 1, 2]


def test_a_model_that_transformers_cannot_run_tells_by_its_configuration() -> None:
    config = LlamaConfig(num_hidden_layers=4, **SMALL)
    config.layer_types = ["linear_attention", "full_attention", "chunked_attention", "full_attention"]

    class Unknown(LlamaConfig):
        model_type = "unknown"

    unknown = Unknown(**config.to_dict())
    unknown.layer_types = config.layer_types
    assert able(unknown) == [1, 3]
