"""One probe: scores, ablation and quality curves over prompts, saved as they come so that it can go on after a stop."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

from vllm_trimix.hf_attention import layers as hf_layers
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import choice
from vllm_trimix.probing.gradient import SECTIONS, Objective, Sample, SectionScores, mean_scores, score_sample
from vllm_trimix.probing.saved import Saved

Method = Literal["gradient", "ablation", "both"]
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Settings:
    """What decides a probe's figures; a stopped probe goes on only under the same.

    Attributes:
        model: As the user named it.
        pattern: The triangle's parameters.
        method: Whose importance ranks the layers; ``both`` ranks by gradient.
        score: Gradient score that ranks.
        objective: What the gradient is of.
        num_random: Random orders to compare with.
        seed: Of prompts and random orders.
        prompts: Hash of the prompts.
        dtype: Of weights and activations.
        device: Where it runs.
    """

    model: str
    pattern: Triangle
    method: Method
    score: str
    objective: Objective
    num_random: int
    seed: int
    prompts: str
    dtype: str
    device: str


@dataclass(frozen=True)
class Outcome:
    """What a probe found.

    Attributes:
        settings: As it ran.
        scores: Mean gradient scores: score -> [layer][section]; None with ``ablation`` alone.
        ablation: [layer][sample] nats lost; None with ``gradient`` alone.
        importance: [layer], what ranks; 0 in stock layers.
        stock: Layers that stay as they are by the model's own design, never in a set, with the reason.
        orders: Order -> layers.
        drops: Order -> [k][sample], nats lost with the first k layers in triangle.
        correct: Order -> [k], share of samples whose answer stays the likeliest.
        logprobs: [sample], the dense answers' log-probability.
        chosen: Triangle layers, by importance.
    """

    settings: Settings
    scores: dict[str, list[list[float]]] | None
    ablation: list[list[float]] | None
    importance: list[float]
    stock: dict[int, str]
    orders: dict[str, list[int]]
    drops: dict[str, list[list[float]]]
    correct: dict[str, list[float]]
    logprobs: list[float]
    chosen: list[int]


def run(
    model: Any,
    settings: Settings,
    *,
    scored: Sequence[Sample],
    held_out: Sequence[Sample],
    saved: Saved,
    progress: Progress = lambda what, done, total: None,
) -> Outcome:
    """Scores layers on some samples and chooses among them on others.

    Args:
        model: A causal language model of transformers, in evaluation mode, on its device.
        settings: What to do.
        scored: Samples for the importance.
        held_out: Samples for the choice.
        saved: Where finished work is kept.
        progress: Told the phase, and how much of it is done.
    """
    num_layers = hf_layers.num_layers(model)
    pattern = settings.pattern
    stock = check_layers(model)
    scores, ablation = None, None
    if settings.method != "ablation":
        found = []
        for index, sample in enumerate(scored):
            progress("gradient", index, len(scored))
            score = partial(score_sample, model, sample, pattern, objective=settings.objective)
            found.append(saved.get(f"score {index}", score))
        scores = mean_scores([SectionScores(**item) for item in found])
    with choice.TriangleModel(model, pattern) as triangle:

        def quality(name: str, sample: Sample, layers: Iterable[int]) -> choice.Quality:
            key = f"{name} {','.join(map(str, sorted(layers)))}"
            return choice.Quality(**saved.get(key, partial(triangle.quality, sample, layers)))

        if settings.method != "gradient":
            ablation = _ablate(quality, scored, num_layers, stock, progress)
        if scores is not None:
            importance = [row[SECTIONS.index("middle")] for row in scores[settings.score]]
        else:
            assert ablation is not None
            importance = [statistics.fmean(row) for row in ablation]
        orders = choice.orders(importance, excluded=stock, num_random=settings.num_random, seed=settings.seed)
        drops: dict[str, list[list[float]]] = {}
        correct: dict[str, list[float]] = {}
        dense = [quality(f"held out {index}", sample, ()) for index, sample in enumerate(held_out)]
        total, done = len(orders) * (len(orders["importance"]) + 1) * len(held_out), 0
        for name, order in orders.items():
            drops[name], correct[name] = [], []
            for k in range(len(order) + 1):
                now = []
                for index, sample in enumerate(held_out):
                    progress("quality", done, total)
                    now.append(quality(f"held out {index}", sample, order[:k]))
                    done += 1
                drops[name].append([a.logprob - b.logprob for a, b in zip(dense, now, strict=True)])
                correct[name].append(statistics.fmean(item.correct for item in now))
    chosen = sorted(orders["importance"][: choice.choose(drops["importance"])])
    logprobs = [item.logprob for item in dense]
    return Outcome(settings, scores, ablation, importance, stock, orders, drops, correct, logprobs, chosen)


def check_layers(model: Any) -> dict[int, str]:
    """Layers that stay stock, with the reason.

    Raises:
        ValueError: The model's attention can't be replaced, or no layer can be a triangle layer.
    """
    hf_layers.check_model(model)
    stock = hf_layers.stock_layers(model)
    if len(stock) == hf_layers.num_layers(model):
        raise ValueError(
            f"{type(model).__name__}: no layer can be sparse: all stay stock ({hf_layers.describe(stock)})"
        )
    return stock


def _ablate(
    quality: Callable[[str, Sample, Iterable[int]], choice.Quality],
    scored: Sequence[Sample],
    num_layers: int,
    stock: Collection[int],
    progress: Progress,
) -> list[list[float]]:
    """Middle knocked out in one layer at a time: [layer][sample], nats that the answer loses; 0 in stock layers."""
    found = []
    for layer in range(num_layers):
        if layer in stock:
            found.append([0.0] * len(scored))
            continue
        row = []
        for index, sample in enumerate(scored):
            progress("ablation", layer * len(scored) + index, num_layers * len(scored))
            name = f"scored {index}"
            row.append(quality(name, sample, ()).logprob - quality(name, sample, (layer,)).logprob)
        found.append(row)
    return found
