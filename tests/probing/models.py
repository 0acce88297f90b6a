"""Tiny random models of many families, and circuit models, for the probe."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhiConfig,
    Qwen2Config,
    Qwen3Config,
)

from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec
from vllm_trimix.demo.prompts import make_demo_prompt
from vllm_trimix.probing.gradient import Sample

NUM_LAYERS = 4
_SIZES = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.25,
}
# Every layer of these sees all keys; the soft cap and the windows of Gemma are below.
FAMILIES: dict[str, Any] = {
    "llama": LlamaConfig(**_SIZES),
    "llama3-rope": LlamaConfig(
        **_SIZES,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "qwen2": Qwen2Config(**_SIZES),
    "qwen3": Qwen3Config(**_SIZES),
    "mistral": MistralConfig(**_SIZES, sliding_window=None),
    "phi": PhiConfig(**_SIZES),
    "phi3": Phi3Config(**_SIZES),
}
# Layers 0 and 2 of Gemma 2 have a window, 1 and 3 don't; all of Gemma 3's four do.
WINDOWED: dict[str, tuple[Any, list[int]]] = {
    "gemma2": (Gemma2Config(**_SIZES, sliding_window=20), [0, 2]),
    "gemma3": (Gemma3TextConfig(**_SIZES, sliding_window=20), [0, 1, 2, 3]),
    "mistral-window": (MistralConfig(**_SIZES, sliding_window=20), [0, 1, 2, 3]),
}
ALL = {**FAMILIES, **{name: config for name, (config, _) in WINDOWED.items()}}


def tiny(name: str) -> Any:
    """A random model of a family, fp32, with transformers' plain attention."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(ALL[name], attn_implementation="eager").float().eval()


def tokens(count: int, *, seed: int = 1) -> torch.Tensor:
    """Random tokens, [1, count]."""
    return torch.randint(3, 100, (1, count), generator=torch.Generator().manual_seed(seed))


def sample(prompt_len: int, answer_len: int) -> Sample:
    """Random tokens as prompt and answer."""
    drawn = tokens(prompt_len + answer_len)[0].tolist()
    return Sample(tuple(drawn[:prompt_len]), tuple(drawn[prompt_len:]))


@functools.cache
def circuit(
    *,
    layers: int = 8,
    lookup: int = 3,
    answer: int = 6,
    sharpness: float = 1.0,
    heads: int = 8,
    distractor_heads: int = 0,
) -> tuple[Any, Any]:
    """A circuit model and its tokenizer, fp32."""
    spec = CircuitSpec(
        layers=layers,
        lookup_layer=lookup,
        answer_layer=answer,
        sharpness=sharpness,
        heads=heads,
        distractor_heads=distractor_heads,
        dtype="float32",
    )
    with tempfile.TemporaryDirectory() as folder:
        make_demo_model(Path(folder), spec)
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        return model, AutoTokenizer.from_pretrained(folder)


def question(tokenizer: Any, *, tokens: int, hops: int, seed: int) -> Sample:
    """A demo prompt as tokens."""
    prompt = make_demo_prompt(tokens=tokens, hops=hops, seed=seed)
    return Sample(
        tuple(tokenizer(prompt.prompt).input_ids), tuple(tokenizer(prompt.answer, add_special_tokens=False).input_ids)
    )
