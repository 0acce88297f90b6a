"""Tiny random Llamas and their independent truth: HF transformers in fp32 with the mask applied per layer."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch

from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.selection import Chunk
from vllm_trimix.patterns.triangle import Triangle

VOCAB_SIZE = 256
NUM_LAYERS = 4


def save_tiny_llama(
    path: Path, *, num_heads: int, num_kv_heads: int, head_size: int = 32, seed: int = 0, embedding_scale: float = 1.0
) -> Path:
    """Writes a random fp32 Llama with weights large enough that attention matters.

    With embeddings scaled by 1000 the likeliest next token follows from the last one alone: answers run in circles, so
    that n-grams guess them, while probabilities still depend on the prompt.
    """
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
        model = LlamaForCausalLM(config).float()
        model.model.embed_tokens.weight.data *= embedding_scale
        model.save_pretrained(path)
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
    # Leading rows that an earlier prompt left in the cache, and the length of that prompt.
    earlier = (0, 0)
    # Patterns of each layer's heads, and the sparse rows [first, end) of the pass in progress.
    dynamic: ClassVar[dict[int, Sequence[DynamicPattern]]] = {}
    body = (0, 0)


def _masked(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    **_: object,
) -> tuple[torch.Tensor, None]:
    keys = torch.arange(key.shape[2])
    rows = keys[-query.shape[2] :]
    if module.layer_idx in _Rule.layers:
        mask = _Rule.pattern.mask(rows, keys, _Rule.prompt_len)
        cached, cached_len = _Rule.earlier
        mask[:cached] = _Rule.pattern.mask(rows[:cached], keys, cached_len)
    else:
        mask = rows[:, None] >= keys
    if module.layer_idx in _Rule.dynamic and _Rule.body[1] > _Rule.body[0]:
        mask = mask.repeat(query.shape[1], 1, 1)
        body = slice(_Rule.body[0] - int(rows[0]), _Rule.body[1] - int(rows[0]))
        for head, pattern in enumerate(_Rule.dynamic[module.layer_idx]):
            q, k = query[0, head : head + 1], key[0, head * key.shape[1] // query.shape[1]][None]
            chunk = Chunk(q[:, body], q[:, -pattern.last_rows :], k, _Rule.body[0], scaling)
            mask[head, body] = pattern.select([pattern], chunk).mask(len(keys))[0]
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~mask, float("-inf"))
    return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None


def true_logprobs(
    path: Path,
    prompt: list[int],
    answer: list[int],
    *,
    layers: frozenset[int],
    pattern: Triangle,
    earlier: tuple[int, int] = (0, 0),
) -> list[float]:
    """Log-probability of each answer token, given the prompt and the answer before it, under the mask.

    Args:
        path: The model.
        prompt: Its tokens.
        answer: Tokens to score.
        layers: Triangle layers.
        pattern: The triangle.
        earlier: Leading rows that an earlier prompt computed and left in the cache, and the length of that prompt,
            whose rule they follow.
    """
    return _true_logprobs(str(path), tuple(prompt), tuple(answer), layers, pattern, earlier)


# Engines that differ in nothing but how they cut the work say the same.
@functools.cache
@torch.no_grad()
def _true_logprobs(
    path: str,
    prompt: tuple[int, ...],
    answer: tuple[int, ...],
    layers: frozenset[int],
    pattern: Triangle,
    earlier: tuple[int, int],
) -> list[float]:
    _Rule.layers, _Rule.pattern, _Rule.prompt_len, _Rule.dynamic = layers, pattern, len(prompt), {}
    _Rule.earlier = earlier
    logits = _load(path)(torch.tensor([prompt + answer[:-1]]), use_cache=False).logits[0, len(prompt) - 1 :]
    return torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()


@torch.no_grad()
def true_dynamic_logprobs(
    path: Path,
    prompt: list[int],
    answer: list[int],
    *,
    layers: frozenset[int],
    pattern: Triangle,
    dynamic: dict[int, Sequence[DynamicPattern]],
    spans: list[tuple[int, int, int]],
) -> list[float]:
    """As ``true_logprobs``, with dynamic patterns in some layers, chunk by chunk as the engine cut the prompt.

    Args:
        path: The model.
        prompt: Its tokens.
        answer: Tokens to score.
        layers: Triangle layers.
        pattern: The triangle.
        dynamic: Patterns of each such layer's query heads.
        spans: Of each sparse chunk, ascending: first position, sparse rows, and keys at the chunk's last prompt row.
    """
    from transformers import DynamicCache

    _Rule.layers, _Rule.pattern, _Rule.prompt_len, _Rule.dynamic = layers, pattern, len(prompt), dynamic
    _Rule.earlier = (0, 0)
    tokens, cache, logits = prompt + answer[:-1], DynamicCache(), []
    edges = [edge for position, _, end in spans for edge in (position, end)]
    bodies = {position: (position, position + rows) for position, rows, _ in spans}
    for start, stop in zip([0, *edges], [*edges, len(tokens)], strict=True):
        if stop > start:
            _Rule.body = bodies.get(start, (0, 0))
            logits.append(_load(str(path))(torch.tensor([tokens[start:stop]]), past_key_values=cache).logits[0])
    _Rule.body = (0, 0)
    rows = torch.cat(logits)[len(prompt) - 1 :]
    return torch.log_softmax(rows.double(), -1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist()
