"""A pretrained model in the real engine: under the shipped set its answers stay, and a bad set is seen."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
from tokenizers import Tokenizer

from tests.real_models.asking import ANSWER_TOKENS, OFF, answered, divergence, is_found, needle, pieces
from tests.real_models.fetched import ROOT, fetched
from tests.tiers import Tier
from vllm_trimix.config.resolve import resolve

pytestmark = [pytest.mark.tier("L"), pytest.mark.timeout(1800)]

PRESET = ROOT / "benchmarks/real_models/presets/smollm2-135m.json"
NUM_LAYERS = 30
SHIPPED = {"preset": str(PRESET), "min_prompt_len": 0}
# One sink, next to no window, no dense last rows, and no layer that sees the rest.
BAD = {"layers": f"0-{NUM_LAYERS - 1}", "n_init": 1, "n_local": 16, "last_n": 0, "min_prompt_len": 0}
# Sentences, and how deep the needle lies.
NEEDLES = [(110, 0.2), (175, 0.6)]
TEXTS = [1200, 1300]
MOST = 0.02
"""Nats by which the distribution after a text may differ."""


@dataclass
class Seen:
    """What engines said to the same requests, needles first, then texts.

    Attributes:
        tokenizer: The model's.
        numbers: What is hidden.
        prompts: Lengths in tokens.
        stock: Answers of stock vLLM.
        opted_out: Of requests that opted out.
        sparse: Under the shipped set.
        bad: Of the first needle and the first text under the bad set.
        rows: Counters of the engine with the shipped set, opted-out requests included.
        layer_rows: Rows that its kernel computed, by the name of the layer.
    """

    tokenizer: Tokenizer
    numbers: list[str]
    prompts: list[int]
    stock: list[dict[str, Any]]
    opted_out: list[dict[str, Any]]
    sparse: list[dict[str, Any]]
    bad: list[dict[str, Any]]
    rows: dict[str, int]
    layer_rows: dict[str, int]

    def found(self, answers: Iterable[dict[str, Any]]) -> list[bool]:
        """Which answers to needles hold their numbers."""
        return [is_found(self.tokenizer, *pair) for pair in zip(answers, self.numbers, strict=False)]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> Seen:
    model, root = fetched("smollm2-135m"), tmp_path_factory.mktemp("sample")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    hidden = [
        needle(tokenizer, seed, sentences=sentences, depth=depth, chat=True)
        for seed, (sentences, depth) in enumerate(NEEDLES)
    ]
    wave: list[dict[str, Any]] = [{"prompt": prompt, "max_tokens": ANSWER_TOKENS} for prompt, _ in hidden]
    wave += [{"prompt": text, "max_tokens": 1, "logprobs": -1} for text in pieces(tokenizer, TEXTS)]
    opted_out = [{**request, "extra_args": OFF} for request in wave]

    def run(name: str, waves: list[list[dict[str, Any]]], trimix: dict[str, Any] | None) -> dict[str, Any]:
        return answered(root / name, model, waves, trimix=trimix, max_model_len=2304)

    stock, bad = run("stock", [wave], None), run("bad", [[wave[0], wave[len(NEEDLES)]]], BAD)
    mine = run("shipped", [opted_out, wave], SHIPPED)
    return Seen(
        tokenizer=tokenizer,
        numbers=[number for _, number in hidden],
        prompts=[len(request["prompt"]) for request in wave],
        stock=stock["waves"][0],
        opted_out=mine["waves"][0],
        sparse=mine["waves"][1],
        bad=bad["waves"][0],
        rows=mine["rows"],
        layer_rows=mine["layer_rows"],
    )


def test_opted_out_answers_are_stocks_bit_for_bit(seen: Seen) -> None:
    assert seen.opted_out == seen.stock
    assert seen.sparse != seen.stock, "the mask changed nothing: this file proves nothing"


def test_needles_are_found_under_the_shipped_set(seen: Seen, tier: Tier) -> None:
    assert seen.prompts[0] > 1000
    assert seen.found(seen.stock) == [True] * len(NEEDLES), "the model can't do it: choose other prompts"
    assert seen.found(seen.sparse) == [True] * len(NEEDLES)
    for place in NEEDLES:
        tier.case("needle", "smollm2-135m", *place, triangle=True)


def test_what_follows_a_text_stays_as_likely(seen: Seen, tier: Tier) -> None:
    for length, dense, sparse in zip(TEXTS, seen.stock[len(NEEDLES) :], seen.sparse[len(NEEDLES) :], strict=True):
        assert 0 < divergence(dense, sparse) < MOST
        assert sparse["tokens"] == dense["tokens"]
        tier.case("text", "smollm2-135m", length, triangle=True)


def test_a_bad_set_fails_both(seen: Seen) -> None:
    needle, text = seen.bad
    assert seen.found([needle]) == [False]
    assert divergence(seen.stock[len(NEEDLES)], text) > 10 * MOST


def test_rows_are_those_of_the_plan(seen: Seen) -> None:
    settings = resolve(SHIPPED, model="smollm2-135m", num_layers=NUM_LAYERS)
    body = sum(length - settings.last_n for length in seen.prompts)
    assert seen.rows["triangle"] == body
    assert seen.rows["last_n"] == settings.last_n * len(seen.prompts)
    assert seen.rows["opt_out"] == sum(seen.prompts)
    assert {int(name.split(".")[2]) for name in seen.layer_rows} == set(settings.layers)
    assert set(seen.layer_rows.values()) == {body}
    assert seen.rows["triangle_layer_rows"] == body * len(settings.layers)
