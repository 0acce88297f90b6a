"""One search: every layer measured on every prompt, a choice, and a check of it on the model itself.

All layers are measured inside one dense forward pass a prompt; each layer's result is kept on disk.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch

from vllm_trimix.hf_attention.layers import num_layers
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.registry import describe
from vllm_trimix.probing.gradient import Sample
from vllm_trimix.probing.passes import Quality, answer_quality
from vllm_trimix.probing.saved import Saved
from vllm_trimix.searching.choice import Budget, by_block_size
from vllm_trimix.searching.measure import Measured
from vllm_trimix.searching.model import measure_prompt, output_weights, use_heads

Progress = Callable[[str, int, int], None]
Score = Literal["output-error", "recall"]


@dataclass(frozen=True)
class Settings:
    """What decides the measurements; a stopped search goes on only under the same.

    Attributes:
        model: As the user named it.
        candidates: Patterns, as ``make_pattern`` reads them.
        layers: Layers to search.
        last_n: The prompt's last rows, which stay dense.
        chunk: Tokens of a chunk; None: the whole prompt at once.
        prompts: Hash of the prompts.
        dtype: Of weights and activations.
        device: Where it runs.
    """

    model: str
    candidates: tuple[dict[str, Any], ...]
    layers: tuple[int, ...]
    last_n: int
    chunk: int | None
    prompts: str
    dtype: str
    device: str


@dataclass(frozen=True)
class Layer:
    """A layer's choice.

    Attributes:
        chosen: A candidate's number for each head.
        measured: Means over the prompts.
    """

    chosen: list[int]
    measured: Measured

    def mean(self, what: str) -> float:
        """Mean over the heads of a chosen candidate's ``density``, ``error``, ``own_error`` or ``recall``."""
        rows = getattr(self.measured, what)
        return statistics.fmean(row[index] for row, index in zip(rows, self.chosen, strict=True))

    @property
    def error(self) -> float:
        """The layer's error if its heads' errors are independent."""
        return math.hypot(*(row[index] for row, index in zip(self.measured.error, self.chosen, strict=True)))


class Head(NamedTuple):
    """A head's choice.

    Attributes:
        layer: Number.
        head: Number.
        candidate: Number.
        loss: What ranked it.
        density: Of dense attention's keys.
    """

    layer: int
    head: int
    candidate: int
    loss: float
    density: float


@dataclass(frozen=True)
class Outcome:
    """What a search found.

    Attributes:
        settings: As it ran.
        score: What ranked candidates.
        budget: Keys that could be spent.
        tolerance: Of a whole layer.
        candidates: As patterns.
        num_layers: Of the model.
        unweighted: Searched layers without a plain output projection: errors are of the heads' outputs themselves.
        layers: Layer -> its choice.
        prompts: [prompt] -> layer -> what was measured.
        dense: Answers under dense attention, one for each prompt that has one.
        sparse: The same with the choice in place.
    """

    settings: Settings
    score: Score
    budget: Budget
    tolerance: float
    candidates: tuple[DynamicPattern, ...]
    num_layers: int
    unweighted: list[int]
    layers: dict[int, Layer]
    prompts: list[dict[int, Measured]]
    dense: list[Quality]
    sparse: list[Quality]

    def patterns(self) -> list[tuple[DynamicPattern, ...] | None]:
        """As ``write_head_file`` takes them."""
        return [
            tuple(self.candidates[index] for index in self.layers[layer].chosen) if layer in self.layers else None
            for layer in range(self.num_layers)
        ]

    def losses(self, layer: int) -> list[list[float]]:
        """What ranked a layer's candidates, [head][candidate]."""
        return losses_of(self.layers[layer].measured, self.score)

    def heads(self) -> list[Head]:
        """Every searched head's choice."""
        found = []
        for layer, entry in self.layers.items():
            losses = self.losses(layer)
            for head, index in enumerate(entry.chosen):
                found.append(Head(layer, head, index, losses[head][index], entry.measured.density[head][index]))
        return found

    @property
    def density(self) -> float:
        """Share of dense attention's keys that all searched layers read."""
        return statistics.fmean(layer.mean("density") for layer in self.layers.values())


def run(
    model: Any,
    settings: Settings,
    *,
    candidates: tuple[DynamicPattern, ...],
    samples: Sequence[Sample],
    score: Score,
    budget: Budget,
    tolerance: float,
    folder: Path,
    progress: Progress = lambda what, done, total: None,
) -> Outcome:
    """Measures, chooses and checks.

    Args:
        model: A causal language model of transformers, in evaluation mode, on its device.
        settings: What to measure.
        candidates: The patterns of ``settings``.
        samples: Prompts; those with an answer check the choice.
        score: What ranks candidates.
        budget: Keys that may be spent.
        tolerance: Of a whole layer's loss.
        folder: Where finished work is kept: a file a prompt.
        progress: Told the phase, and how much of it is done.
    """
    prompts = _measure_all(model, settings, candidates, samples, folder, progress)
    layers = {}
    for layer in settings.layers:
        mean = _mean([prompt[layer] for prompt in prompts])
        losses = losses_of(mean, score)
        # Heads' errors add up like independent ones.
        each = tolerance / math.sqrt(len(losses)) if score == "output-error" else tolerance
        chosen = by_block_size(candidates, losses, mean.density, choose=budget.choose, tolerance=each)
        layers[layer] = Layer(chosen, mean)
    weights = output_weights(model)
    unweighted = [layer for layer in settings.layers if weights[layer] is None]
    heads = {layer: [candidates[index] for index in found.chosen] for layer, found in layers.items()}
    dense, sparse = _check(model, settings, heads, samples, folder, progress)
    return Outcome(
        settings, score, budget, tolerance, candidates, num_layers(model), unweighted, layers, prompts, dense, sparse
    )


def losses_of(measured: Measured, score: Score) -> list[list[float]]:
    """What a score ranks by, [head][candidate]: less is better."""
    return measured.error if score == "output-error" else [[1 - x for x in row] for row in measured.recall]


def _measure_all(
    model: Any,
    settings: Settings,
    candidates: Sequence[DynamicPattern],
    samples: Sequence[Sample],
    folder: Path,
    progress: Progress,
) -> list[dict[int, Measured]]:
    found = []
    for number, sample in enumerate(samples):
        saved = Saved(folder / f"prompt-{number}.json", settings, what="search")
        left = tuple(layer for layer in settings.layers if f"layer {layer}" not in saved)
        before = (number + 1) * len(settings.layers) - len(left)
        count = itertools.count(before + 1)
        progress("measure", before, len(samples) * len(settings.layers))

        def done(layer: int, measured: Measured, saved: Saved = saved, count: Iterator[int] = count) -> None:
            saved.put(f"layer {layer}", measured)
            progress("measure", next(count), len(samples) * len(settings.layers))

        if left:
            measure_prompt(
                model,
                sample.prompt,
                candidates=candidates,
                layers=left,
                last_n=settings.last_n,
                chunk=settings.chunk,
                done=done,
            )
        results = saved.results
        found.append({layer: Measured(**results[f"layer {layer}"]) for layer in settings.layers})
    return found


def _mean(measured: Sequence[Measured]) -> Measured:
    """Means over the prompts."""
    names = ("density", "error", "own_error", "recall")
    return Measured(
        *(
            torch.tensor([getattr(item, name) for item in measured], dtype=torch.float64).mean(0).tolist()
            for name in names
        )
    )


def _check(
    model: Any,
    settings: Settings,
    heads: Mapping[int, Sequence[DynamicPattern]],
    samples: Sequence[Sample],
    folder: Path,
    progress: Progress,
) -> tuple[list[Quality], list[Quality]]:
    """Answers under dense attention and with the choice in place, for the prompts that have one."""
    asked = [(number, sample) for number, sample in enumerate(samples) if sample.answer]
    saved = Saved(folder / "check.json", settings, what="search")
    text = json.dumps({layer: [describe(pattern) for pattern in row] for layer, row in heads.items()})
    runs: list[tuple[str, Mapping[int, Sequence[DynamicPattern]], list[Quality]]] = [
        ("dense", {}, []),
        (hashlib.sha256(text.encode()).hexdigest()[:16], heads, []),
    ]
    steps = itertools.count()
    for number, sample in asked:
        for name, layers, found in runs:
            progress("check", next(steps), len(runs) * len(asked))

            def quality(sample: Sample = sample, layers: Any = layers) -> Quality:
                length = len(sample.prompt)
                with use_heads(model, layers, last_n=settings.last_n, prompt_len=length, chunk=settings.chunk):
                    return answer_quality(model, sample)

            found.append(Quality(**saved.get(f"{name} {number}", quality)))
    return runs[0][2], runs[1][2]
