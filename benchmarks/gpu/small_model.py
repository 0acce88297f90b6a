"""The small random model of the engine stages, and how far answers are from their truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.engine.models import VOCAB_SIZE, save_tiny_llama, true_logprobs
from tests.engine.run import LAYERS, PATTERN

# Gains per kind of weight: attention is sharp enough to matter, and two-byte rounding isn't amplified. In bf16 answers
# are within 0.1 of the fp32 truth, while the mask moves them by 2 on average.
_GAINS = {"q_proj": 1.2, "k_proj": 1.2, "v_proj": 2.0, "o_proj": 2.0, "mlp": 0.3, "lm_head": 3.0}


@dataclass(frozen=True)
class Distances:
    """Differences of log-probabilities, absolute.

    Attributes:
        triangle: Of the triangle answers from their truth, the masked model.
        dense: Of the opted-out answers from theirs, the dense model.
        gap: Of the triangle answers to long prompts from the dense model.
    """

    triangle: list[float]
    dense: list[float]
    gap: list[float]


def save_small_model(directory: Path) -> Path:
    """Writes a Llama of 4 layers whose weights are exact in bf16: an engine's rounding is its arithmetic's alone."""
    save_tiny_llama(directory, num_heads=8, num_kv_heads=2, head_size=64)
    file = directory / "model.safetensors"
    weights = {name: _scaled(name, weight) for name, weight in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    return directory


def _scaled(name: str, weight: torch.Tensor) -> torch.Tensor:
    if weight.ndim != 2:
        return weight
    gain = next((gain for kind, gain in _GAINS.items() if kind in name), None)
    spread = 1.0 if gain is None else gain * weight.shape[1] ** -0.5
    return (weight * (spread / weight.std())).bfloat16().float()


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random prompts of these lengths, in tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


def distances(
    model: Path,
    wave: list[dict[str, Any]],
    answers: list[dict[str, Any]],
    *,
    layers: frozenset[int] = LAYERS,
) -> Distances:
    """Compares answers with Hugging Face in fp32.

    Args:
        model: The checkpoint.
        wave: Requests, as for ``run_job``.
        answers: Their answers.
        layers: Triangle layers of the masked truth.
    """
    found = Distances([], [], [])
    for request, answer in zip(wave, answers, strict=True):
        opted_out = (request.get("extra_args") or {}).get("trimix") == "off"
        truth = _differences(model, request, answer, frozenset() if opted_out else layers)
        (found.dense if opted_out else found.triangle).extend(truth)
        if not opted_out and len(request["prompt"]) > 4 * PATTERN.dense_len:
            found.gap.extend(_differences(model, request, answer, frozenset()))
    return found


def _differences(model: Path, request: dict[str, Any], answer: dict[str, Any], layers: frozenset[int]) -> list[float]:
    truth = true_logprobs(model, request["prompt"], answer["tokens"], layers=layers, pattern=PATTERN)
    return [abs(a - b) for a, b in zip(truth, answer["logprobs"], strict=True)]
