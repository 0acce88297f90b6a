"""What a pretrained model is asked in tests, and engines that answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from tests.families.run import ENVIRONMENT, phase, start_line
from vllm_trimix.evaluation.haystack import needles

ROOT = Path(__file__).parents[2]
ANSWER_TOKENS = 12
"""A number of seven digits, a token each, and what may stand around it."""
OFF = {"trimix": "off"}
_CHAT = (
    "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
    "<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n{prefix}"
)


def needle(tokenizer: Tokenizer, seed: int, *, sentences: int, depth: float, chat: bool) -> tuple[list[int], str]:
    """RULER's single needle among sentences about a village: the prompt's tokens, and the number to find."""
    asked = needles()(f"pretrained {seed}", sentences, depth)
    form = _CHAT if chat else "{text} {prefix}"
    return tokenizer.encode(form.format(text=asked.text, prefix=asked.prefix)).ids, asked.references[0]


def is_found(tokenizer: Tokenizer, answer: dict[str, Any], number: str) -> bool:
    """Whether an answer holds the number."""
    return number in tokenizer.decode(answer["tokens"]).replace(",", "").replace(" ", "")


def pieces(tokenizer: Tokenizer, lengths: list[int]) -> list[list[int]]:
    """Stretches of prose, one after the other, that end wherever they end.

    Raises:
        ValueError: There is less.
    """
    tokens = tokenizer.encode((ROOT / "tests/data/prose.txt").read_text(), add_special_tokens=False).ids
    if sum(lengths) > len(tokens):
        raise ValueError(f"lengths: {sum(lengths)} tokens in all, the text has {len(tokens)}; ask for less")
    ends = [sum(lengths[: number + 1]) for number in range(len(lengths))]
    return [tokens[end - length : end] for end, length in zip(ends, lengths, strict=True)]


def answered(
    folder: Path, model: Path, waves: list[list[dict[str, Any]]], *, trimix: dict[str, Any] | None, max_model_len: int
) -> dict[str, Any]:
    """Runs a real engine in fp32 over the waves, in chunks that no prompt fits into.

    Args:
        folder: An empty one, for its log and result.
        model: The checkpoint.
        waves: Lists of requests, as ``tests/families`` has them.
        trimix: The entry; None: stock vLLM.
        max_model_len: Tokens of the longest prompt with its answer.
    """
    engine: dict[str, Any] = {
        "model": str(model),
        "skip_tokenizer_init": True,
        "enforce_eager": True,
        "dtype": "float32",
        "max_model_len": max_model_len,
        "max_num_batched_tokens": 700,
        "max_num_seqs": 8,
        "block_size": 32,
        "enable_prefix_caching": False,
        "max_logprobs": -1,
        "seed": 0,
    }
    name = "stock" if trimix is None else "trimix"
    if trimix is not None:
        engine |= {"attention_backend": "TRIMIX", "additional_config": {"trimix": trimix}}
    folder.mkdir()
    seen = phase(name, {"engine": engine, "waves": waves, "std": (0.0, 0.0), "env": ENVIRONMENT}, folder)
    assert not seen.error, f"{name}: {seen.error}\n{seen.log[-6000:]}"
    assert bool(start_line(seen.log)) is (trimix is not None)
    found: dict[str, Any] = seen.result
    return found


def divergence(dense: dict[str, Any], sparse: dict[str, Any]) -> float:
    """Kullback-Leibler divergence of the first answer token's distribution from the dense one, in nats."""
    p, q = (torch.tensor(answer["first"], dtype=torch.float64) for answer in (dense, sparse))
    return float((p.exp() * (p - q)).sum())
