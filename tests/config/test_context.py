"""How many tokens a model takes: the same as vLLM derives."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import AutoConfig, Gemma3TextConfig, GPT2Config, LlamaConfig, MptConfig, Phi3Config, PreTrainedConfig

from vllm_trimix.cli.hf_model import within
from vllm_trimix.config.context import ALLOW_LONG, derived_length, max_length

THETA = {"rope_theta": 1e6}
PHI3: dict[str, Any] = dict(  # noqa: C408
    hidden_size=256, num_attention_heads=4, max_position_embeddings=131072, original_max_position_embeddings=4096
)
FACTORS = [1.0] * 32


def llama(**changes: Any) -> Any:
    return LlamaConfig(max_position_embeddings=4096, **changes)


def foreign(**attributes: Any) -> Any:
    """A configuration that comes with its model: names of its own, the older way to write rope's settings."""
    config = AutoConfig.for_model("llama", max_position_embeddings=4096)
    for name, value in attributes.items():
        setattr(config, name, value)
    return config


CASES = {
    "plain": (llama(), 4096),
    "linear": (llama(rope_parameters={**THETA, "rope_type": "linear", "factor": 4.0}), 16384),
    "dynamic": (llama(rope_parameters={**THETA, "rope_type": "dynamic", "factor": 2.0}), 8192),
    "yarn": (
        llama(rope_parameters={**THETA, "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}),
        4096,
    ),
    "llama3": (
        llama(
            rope_parameters={
                **THETA,
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 1024,
            }
        ),
        4096,
    ),
    "longrope": (
        Phi3Config(
            **PHI3, rope_parameters={**THETA, "rope_type": "longrope", "long_factor": FACTORS, "short_factor": FACTORS}
        ),
        131072,
    ),
    "gpt2": (GPT2Config(n_positions=1024), 1024),
    "mpt": (MptConfig(max_seq_len=2048), 2048),
    "the smallest": (foreign(seq_length=2048), 2048),
    "model_max_length": (foreign(model_max_length=8192), 8192),
    "gemma3": (
        Gemma3TextConfig(
            max_position_embeddings=131072,
            rope_parameters={
                "full_attention": {**THETA, "rope_type": "linear", "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        ),
        131072,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_what_vllm_derives(name: str) -> None:
    from vllm.config.model import _get_and_verify_max_len
    from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

    config, length = CASES[name]
    assert derived_length(config) == max_length(config) == length
    text = config.get_text_config()
    keys = ModelArchConfigConvertorBase(config, text).derive_max_model_len_and_key()

    class Shape:
        derived_max_model_len_and_key = keys

    def taken(asked: int | None) -> int:
        return _get_and_verify_max_len(text, Shape(), None, asked, False, None)  # type: ignore[arg-type]

    assert taken(length) == length
    with pytest.raises(ValueError, match="max_model_len"):
        taken(length + 1)


def test_older_spellings_count() -> None:
    config = foreign()
    config.rope_parameters = None
    config.rope_scaling = {"type": "linear", "factor": 4.0}
    assert derived_length(config) == 16384
    config.rope_scaling = {"type": "linear", "factor": None}
    assert derived_length(config) == 4096


def test_nothing_named_is_no_limit() -> None:
    assert max_length(PreTrainedConfig()) is None


@pytest.mark.parametrize(("value", "limit"), [("1", None), ("true", None), ("0", 4096), ("", 4096)])
def test_vllms_variable_lifts_the_limit(monkeypatch: pytest.MonkeyPatch, value: str, limit: int | None) -> None:
    monkeypatch.setenv(ALLOW_LONG, value)
    assert max_length(llama()) == limit
    assert derived_length(llama()) == 4096


def test_default_lengths_of_prompts_are_made_to_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert within([8192], None, flag="--length", is_default=True) == [8192]
    assert within([4096, 8192], 8192, flag="--lengths", is_default=False) == [4096, 8192]
    assert within([8192], 4096, flag="--length", is_default=True) == [3840]
    assert "--length: 3840 instead of 8192 tokens: the model takes 4096" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--length: 8192 tokens: the model takes 4096; take shorter prompts"):
        within([8192], 4096, flag="--length", is_default=False)
