"""Ground truth: on a circuit model it is known which heads read from the middle, and which answer needs it."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.probing.models import circuit, question
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.block_sparse import BlockSparse
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.registry import describe
from vllm_trimix.patterns.vertical_slash import VerticalSlash
from vllm_trimix.probing.gradient import Sample
from vllm_trimix.probing.passes import answer_quality
from vllm_trimix.searching.choice import Budget
from vllm_trimix.searching.model import use_heads
from vllm_trimix.searching.report import poor_heads
from vllm_trimix.searching.search import Outcome, Settings, losses_of, run

LAYERS, LOOKUP, ANSWER, HEADS = 4, 1, 2, 4
LOCAL, WIDE = AShape(4, 16), AShape(64, 512)
CANDIDATES = (LOCAL, WIDE, VerticalSlash(30, 100), BlockSparse(3), Dense())
CRIPPLED = (LOCAL,)
SHARED, ALONE = Budget(0.6, "layer"), Budget(0.45, "head")
MATCH_HEADS = {(LOOKUP, 0), (ANSWER, 0)}
LAST_N = 128


def model(distractors: int) -> tuple[Any, Any]:
    return circuit(layers=LAYERS, lookup=LOOKUP, answer=ANSWER, heads=HEADS, distractor_heads=distractors)


@functools.cache
def search(distractors: int, candidates: tuple[DynamicPattern, ...], budget: Budget) -> Outcome:
    found, tokenizer = model(distractors)
    settings = Settings(
        model="circuit",
        candidates=tuple(describe(pattern) for pattern in candidates),
        layers=tuple(range(LAYERS)),
        last_n=LAST_N,
        chunk=None,
        prompts="",
        dtype="float32",
        device="cpu",
    )
    samples = [question(tokenizer, tokens=1000, hops=2, seed=seed) for seed in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        return run(
            found,
            settings,
            candidates=candidates,
            samples=samples,
            score="output-error",
            budget=budget,
            tolerance=0.02,
            folder=Path(folder),
        )


def answers(distractors: int, outcome: Outcome, sample: Sample) -> bool:
    found, _ = model(distractors)
    heads = {layer: patterns for layer, patterns in enumerate(outcome.patterns()) if patterns is not None}
    with use_heads(found, heads, last_n=LAST_N, prompt_len=len(sample.prompt)):
        return answer_quality(found, sample).correct


@pytest.mark.parametrize("distractors", [0, 2])
def test_every_head_gets_what_it_needs(distractors: int) -> None:
    """The heads that read from the middle keep all keys; previous-token and idle heads read as few as they can."""
    outcome = search(distractors, CANDIDATES, SHARED)
    assert [outcome.candidates[outcome.layers[layer].chosen[0]] for layer in (LOOKUP, ANSWER)] == [Dense(), Dense()]
    distracting = {(LAYERS - 1, head) for head in range(distractors)}
    for layer, head, candidate, loss, density in outcome.heads():
        if (layer, head) not in MATCH_HEADS | distracting:
            assert (candidate, loss < 1e-3) == (CANDIDATES.index(LOCAL), True), (layer, head)
            assert density == min(outcome.layers[layer].measured.density[head])
    assert all(layer.mean("density") <= SHARED.share for layer in outcome.layers.values())
    assert all(outcome.layers[layer].error < 1e-3 for layer in range(LAYERS - 1))
    assert [item.correct for item in outcome.sparse] == [item.correct for item in outcome.dense] == [True, True]
    assert outcome.unweighted == []


@pytest.mark.parametrize("distractors", [0, 2])
def test_without_a_fitting_candidate_exactly_the_reading_heads_err(distractors: int) -> None:
    outcome = search(distractors, CRIPPLED, ALONE)
    errors = {(layer, head): loss for layer, head, _, loss, _ in outcome.heads() if layer < LAYERS - 1}
    assert {place for place, loss in errors.items() if loss > 0.3} == MATCH_HEADS
    assert all(loss < 1e-3 for place, loss in errors.items() if place not in MATCH_HEADS)
    # As docs/search.md says.
    assert [round(errors[place], 2) for place in sorted(MATCH_HEADS)] == [0.93, 0.65]
    assert [item.correct for item in outcome.sparse] == [False, False]
    poor = [(head.layer, head.head) for head in poor_heads(outcome) if head.layer < LAYERS - 1]
    assert (poor[0], set(poor)) == ((LOOKUP, 0), MATCH_HEADS)


def test_the_model_answers_at_4k_with_the_choice_and_without_the_lookup_it_fails() -> None:
    """The choice was made at 1000 tokens. A one-hop answer is read by the dense last rows, and stays right."""
    found, tokenizer = model(0)
    two, one = (question(tokenizer, tokens=tokens, hops=hops, seed=7) for tokens, hops in ((4096, 2), (1500, 1)))
    assert answers(0, search(0, CANDIDATES, SHARED), two)
    assert not answers(0, search(0, CRIPPLED, ALONE), two)
    assert answers(0, search(0, CRIPPLED, ALONE), one)
    # Of the two heads that err, the answer hangs on the lookup alone.
    heads = {layer: [LOCAL] * HEADS for layer in range(LAYERS)}
    heads[LOOKUP] = [Dense(), *heads[LOOKUP][1:]]
    with use_heads(found, heads, last_n=LAST_N, prompt_len=4096):
        assert answer_quality(found, two).correct


def test_recall_misjudges_idle_heads() -> None:
    """By attention mass heads that attend evenly and write nothing lose most: hence the output error by default."""
    outcome = search(0, CRIPPLED, ALONE)
    losses = torch.tensor([losses_of(outcome.layers[layer].measured, "recall") for layer in range(LAYERS)])[:, :, 0]
    assert losses[0, :2].max() < 1e-3
    assert bool((losses[0, 2:] > 0.5).all())
    # Few rows look something up; all others attend to BOS.
    assert 0 < losses[LOOKUP, 0] < 0.3
