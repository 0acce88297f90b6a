"""The layer choice: what answers lose with k layers in triangle, and the largest k that loses nothing measurable."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vllm_trimix.hf_attention import install
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing.gradient import Sample, answer_logits

CONFIDENCE = 0.95
MAX_DROP = 0.01
"""Nats that the answers' mean log-probability may lose."""


@dataclass(frozen=True)
class Quality:
    """How well a sample's answer is predicted.

    Attributes:
        logprob: Log-probability of the answer, natural log, summed over its tokens.
        correct: Whether every token of it is the likeliest.
    """

    logprob: float
    correct: bool


class TriangleModel:
    """A model whose triangle layers can be set, for comparing layer sets; use as a context."""

    def __init__(self, model: Any, pattern: Triangle) -> None:
        self._model, self._pattern = model, pattern

    def __enter__(self) -> TriangleModel:
        self._settings = install(self._model, layers=[], pattern=self._pattern)
        return self

    def __exit__(self, *_: object) -> None:
        self._settings.remove()

    def quality(self, sample: Sample, layers: Iterable[int]) -> Quality:
        """Teacher-forced quality of a sample's answer with these layers in triangle."""
        self._settings.layers, self._settings.prompt_len = frozenset(layers), len(sample.prompt)
        return answer_quality(self._model, sample)

    @property
    def stock(self) -> dict[int, str]:
        """Layers that can't be triangle layers, with the reason."""
        return self._settings.stock


@torch.no_grad()
def answer_quality(model: Any, sample: Sample) -> Quality:
    """Teacher-forced quality of a sample's answer, under the attention that the model has now."""
    logits = answer_logits(model, sample)
    answer = torch.tensor(sample.answer, device=logits.device)
    logprobs = torch.log_softmax(logits.double(), dim=-1).gather(1, answer[:, None])
    return Quality(float(logprobs.sum()), bool((logits.argmax(-1) == answer).all()))


def rank(importance: Sequence[float], *, excluded: Iterable[int] = ()) -> list[int]:
    """Layers from the least important to the most; among equals the deeper first. Excluded ones don't appear."""
    layers = [layer for layer in range(len(importance)) if layer not in set(excluded)]
    return sorted(layers, key=lambda layer: (importance[layer], -layer))


def orders(importance: Sequence[float], *, excluded: Iterable[int], num_random: int, seed: int) -> dict[str, list[int]]:
    """Orders in which layers become triangle: by importance, deepest first, and random ones to compare with."""
    ranked = rank(importance, excluded=excluded)
    found = {"importance": ranked, "deepest": sorted(ranked, reverse=True)}
    for index in range(num_random):
        shuffled = sorted(ranked)
        random.Random(f"{seed} {index}").shuffle(shuffled)
        found[f"random {index + 1}"] = shuffled
    return found


def upper_bound(drops: Sequence[float]) -> float:
    """Upper end of the one-sided 95% interval of the mean, by Student's t; infinite for a single value."""
    # Heavy, and of the extras.
    from scipy import stats

    if len(drops) < 2:
        return float("inf")
    spread = statistics.stdev(drops) / len(drops) ** 0.5
    return statistics.fmean(drops) + float(stats.t.ppf(CONFIDENCE, len(drops) - 1)) * spread


def choose(drops: Sequence[Sequence[float]], *, max_drop: float = MAX_DROP) -> int:
    """The largest k whose mean drop is surely small.

    Args:
        drops: For k = 0, 1, ...: what each sample's answer lost, in nats.
        max_drop: What the upper bound of the mean may be.
    """
    return max((k for k, values in enumerate(drops) if k == 0 or upper_bound(values) <= max_drop), default=0)
