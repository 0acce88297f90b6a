"""The search on a model that was trained: the choice errs less than the cheapest pattern everywhere."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_trimix.demo.trained_task import make_trained_prompt
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.block_sparse import BlockSparse
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.registry import describe
from vllm_trimix.patterns.vertical_slash import VerticalSlash
from vllm_trimix.probing.gradient import Sample
from vllm_trimix.searching.choice import Budget
from vllm_trimix.searching.model import use_heads
from vllm_trimix.searching.search import Outcome, Settings, run

MODEL = Path(__file__).parents[2] / "tests/data/trained-small"
CANDIDATES = (AShape(2, 6), AShape(4, 64), VerticalSlash(30, 50), VerticalSlash(60, 50), BlockSparse(2), Dense())
LAST_N = 4


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    made = [make_trained_prompt(records=96, seed=7000 + seed) for seed in range(6)]
    return [
        Sample(tuple(tokenizer(p.prompt).input_ids), tuple(tokenizer(p.answer, add_special_tokens=False).input_ids))
        for p in made
    ]


def search(model: Any, samples: list[Sample], folder: Path, budget: Budget) -> Outcome:
    settings = Settings(
        "trained", tuple(describe(p) for p in CANDIDATES), (0, 1, 2, 3), LAST_N, None, "", "float32", "cpu"
    )
    return run(
        model,
        settings,
        candidates=CANDIDATES,
        samples=samples,
        score="output-error",
        budget=budget,
        tolerance=0.02,
        folder=folder,
    )


def output_error(model: Any, sample: Sample, heads: dict[int, tuple[DynamicPattern, ...]]) -> float:
    """Relative error of the last layer's hidden states over the sparse rows: all layers' errors together."""
    ids = torch.tensor([sample.prompt])
    rows = slice(0, len(sample.prompt) - LAST_N)
    found = []
    for layers in ({}, heads):
        with use_heads(model, layers, last_n=LAST_N, prompt_len=len(sample.prompt)), torch.no_grad():
            found.append(model(ids, output_hidden_states=True).hidden_states[-1][0, rows])
    return float((found[1] - found[0]).norm() / found[0].norm())


@pytest.mark.parametrize("budget", [Budget(0.8, "head"), Budget(0.85, "layer")], ids=["head", "layer"])
def test_the_choice_errs_less_than_the_cheapest_everywhere(
    model: Any, samples: list[Sample], tmp_path: Path, budget: Budget
) -> None:
    outcome = search(model, samples[:3], tmp_path, budget)
    heads = dict(enumerate(patterns for patterns in outcome.patterns() if patterns is not None))
    cheapest = min(
        range(len(CANDIDATES)),
        key=lambda index: statistics.fmean(
            row[index] for layer in outcome.layers.values() for row in layer.measured.density
        ),
    )
    uniform = dict.fromkeys(range(4), (CANDIDATES[cheapest],) * 4)
    assert heads != uniform
    # On prompts that the search has not seen.
    chosen, plain = (
        statistics.fmean(output_error(model, sample, layers) for sample in samples[3:]) for layers in (heads, uniform)
    )
    assert chosen < 0.8 * plain
    densities = [layer.mean("density") for layer in outcome.layers.values()]
    assert max(densities) <= budget.share
    # What the layers' errors promise, and what their sum does to the model, is of one size.
    assert all(layer.error < 0.9 for layer in outcome.layers.values())
