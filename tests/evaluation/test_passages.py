"""Passages of long texts: their places, their lengths, what is refused."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.evaluation import tokenizers
from vllm_trimix.demo.languages import ENGLISH, VAULT
from vllm_trimix.evaluation import haystack
from vllm_trimix.evaluation.sample import Measure, Sample
from vllm_trimix.evaluation.suite import Context
from vllm_trimix.evaluation.suites.registry import SUITES


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, ...]:
    """Two long ones, and one of some 500 tokens between them."""
    paths = []
    for name, sentences in (("first", 400), ("short", 30), ("second", 300)):
        paths.append(tmp_path / f"{name}.txt")
        paths[-1].write_text(" ".join(haystack.prose(random.Random(name), sentences)))
    return tuple(paths)


def made(texts: tuple[Path, ...], length: int, count: int, *, seed: int = 42, language: str = ENGLISH) -> list[Sample]:
    context = Context(tokenizers.english(), seed=seed, documents=texts)
    return SUITES["agreement"].tasks[language]["prompts"](context, length, count)


@pytest.mark.parametrize("language", [ENGLISH, VAULT])
def test_passages_come_from_the_texts_by_turns(texts: tuple[Path, ...], language: str) -> None:
    samples = made(texts, 1000, 6, language=language)
    tokenizer = tokenizers.english()
    whole = {path.name: tokenizer(path.read_text()).input_ids for path in texts}
    assert [sample.source for sample in samples] == ["text: first.txt", "text: second.txt"] * 3
    for sample in samples:
        assert (len(sample.prompt), sample.max_tokens, sample.measure) == (936, 64, Measure.AGREEMENT)
        tokens = whole[sample.source.removeprefix("text: ")]
        assert any(tuple(tokens[at : at + 936]) == sample.prompt for at in range(len(tokens)))
    assert len({sample.prompt for sample in samples}) == 6


def test_a_seed_names_each_passage(texts: tuple[Path, ...]) -> None:
    few, more = made(texts, 1000, 1), made(texts, 1000, 4)
    assert few == more[:1]
    assert not {s.prompt for s in more} & {s.prompt for s in made(texts, 1000, 4, seed=43)}


def test_a_short_text_is_told(texts: tuple[Path, ...]) -> None:
    context = Context(tokenizers.english(), documents=texts)
    SUITES["agreement"].tasks[ENGLISH]["prompts"](context, 1000, 2)
    assert context.notes == ["prompts: short.txt: shorter than 1000 tokens"]


def test_texts_that_hold_no_passage_are_refused(texts: tuple[Path, ...]) -> None:
    longest = max(len(tokenizers.english()(path.read_text()).input_ids) for path in texts) + 64
    for length in (64, longest + 1):
        with pytest.raises(ValueError, match=f"{length} tokens, .* choose lengths from 65 to {longest}"):
            made(texts, length, 1)
    assert len(made(texts, longest, 1)[0].prompt) == longest - 64
    with pytest.raises(FileNotFoundError):
        made((texts[0].with_name("nowhere.txt"),), 1000, 1)
