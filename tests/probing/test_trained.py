"""The probe on a model that was trained, not set by hand: many heads, and softmaxes that are not saturated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_trimix.demo.trained_task import make_trained_prompt
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing.choice import choose, upper_bound
from vllm_trimix.probing.gradient import SECTIONS, Sample, mean_scores, score_sample
from vllm_trimix.probing.passes import TriangleModel
from vllm_trimix.probing.ranking import rank

MODEL = Path(__file__).parents[2] / "tests/data/trained-small"
PATTERN = Triangle(n_init=2, n_local=6, last_n=4)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    made = [make_trained_prompt(records=48, seed=5000 + seed) for seed in range(12)]
    return [
        Sample(tuple(tokenizer(p.prompt).input_ids), tuple(tokenizer(p.answer, add_special_tokens=False).input_ids))
        for p in made
    ]


def test_the_answer_reads_from_its_own_rows(model: Any, samples: list[Sample]) -> None:
    """The paper's picture: by mean |dA| a pair of Last Q-K counts many times one of Middle Q-K, in every layer."""
    found = torch.tensor(mean_scores([score_sample(model, sample, PATTERN) for sample in samples[:4]])["gradient"])
    last, middle = found[:, SECTIONS.index("last")], found[:, SECTIONS.index("middle")]
    assert bool((last > 5 * middle).all())
    assert middle[-1] == 0


def test_sums_of_magnitudes_are_an_upper_bound(model: Any, samples: list[Sample]) -> None:
    """Middle Q-K has a contribution where removing it costs nothing: parts of either sign cancel. Hence the choice."""
    found = mean_scores([score_sample(model, sample, PATTERN) for sample in samples[:4]])["contribution"]
    assert max(row[SECTIONS.index("middle")] for row in found) > 0.1
    with TriangleModel(model, PATTERN) as triangle:
        for sample in samples[:4]:
            dense = triangle.quality(sample, ()).logprob
            assert all(abs(dense - triangle.quality(sample, (layer,)).logprob) < 0.01 for layer in range(4))


def test_every_layer_can_be_a_triangle_layer(model: Any, samples: list[Sample]) -> None:
    """The misalignment, from the probe's side: what only the prompt's own tokens need may go."""
    scores = mean_scores([score_sample(model, sample, PATTERN) for sample in samples[:4]])["contribution"]
    order = rank([row[SECTIONS.index("middle")] for row in scores])
    with TriangleModel(model, PATTERN) as triangle:
        dense = [triangle.quality(sample, ()) for sample in samples[4:]]
        now = [[triangle.quality(sample, order[:k]) for sample in samples[4:]] for k in range(len(order) + 1)]
    assert all(quality.correct for row in now for quality in row)
    losses = [[a.logprob - b.logprob for a, b in zip(dense, row, strict=True)] for row in now]
    assert choose({k: upper_bound(row) for k, row in enumerate(losses)}) == len(order)
    assert choose({k: upper_bound([quality.kl for quality in row]) for k, row in enumerate(now)}) == len(order)
