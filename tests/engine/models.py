"""Tiny random Llamas and their independent truth: HF transformers in fp32 with the mask applied per layer."""

from __future__ import annotations

import functools
from pathlib import Path

import torch

from vllm_trimix.patterns.triangle import Triangle

VOCAB_SIZE = 256
NUM_LAYERS = 4


def save_tiny_llama(path: Path, *, num_heads: int, num_kv_heads: int, head_size: int = 32, seed: int = 0) -> Path:
    """Writes a random fp32 Llama with weights large enough that attention matters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (path / "config.json").exists():
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=num_heads * head_size,
            intermediate_size=128,
            num_hidden_layers=NUM_LAYERS,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_size,
            max_position_embeddings=4096,
            initializer_range=0.25,
            tie_word_embeddings=False,
        )
        LlamaForCausalLM(config).float().save_pretrained(path)
    return path


@functools.cache
def _load(path: str) -> torch.nn.Module:
    from transformers import AttentionInterface, LlamaForCausalLM

    AttentionInterface.register("trimix_truth", _masked)
    return LlamaForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="trimix_truth").eval()


class _Rule:
    """The rule of the run in progress; transformers gives attention functions no other channel."""

    pattern = Triangle()
    layers: frozenset[int] = frozenset()
    prompt_len = 0


def _masked(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    positions = torch.arange(query.shape[2])
    if module.layer_idx in _Rule.layers:
        mask = _Rule.pattern.mask(positions, positions, _Rule.prompt_len)
    else:
        mask = positions[:, None] >= positions
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


@torch.no_grad()
def true_logprobs(
    path: Path, prompt: list[int], answer: list[int], *, layers: frozenset[int], pattern: Triangle
) -> list[float]:
    """Log-probability of each answer token, given the prompt and the answer before it, under the mask."""
    _Rule.layers, _Rule.pattern, _Rule.prompt_len = layers, pattern, len(prompt)
    logits = _load(str(path))(torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
