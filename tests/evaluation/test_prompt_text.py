"""Texts that fill a length, and which language a tokenizer speaks."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from tests.evaluation import tokenizers
from vllm_trimix.demo.languages import LANGUAGES, detect, trained_keys
from vllm_trimix.demo.vocabulary import build_tokenizer, vocabulary
from vllm_trimix.measurement.prompt_text import NeverLonger, NoRoom, largest


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 40), st.integers(1, 8), st.integers(50, 4000))
def test_the_largest_that_fits(seed: int, widest: int, low: int, limit: int) -> None:
    rng = random.Random(seed)
    ends = list(itertools.accumulate((rng.randint(1, widest) for _ in range(6000)), initial=40))
    if ends[low] > limit:
        with pytest.raises(NoRoom, match=f"the shortest has {ends[low]}"):
            largest(ends.__getitem__, limit=limit, low=low)
        return
    size = largest(ends.__getitem__, limit=limit, low=low)
    assert size >= low
    assert ends[size] <= limit < ends[size + 1]


def test_few_long_texts_are_made() -> None:
    read = []
    for seed in range(20):
        rng = random.Random(seed)
        ends = list(itertools.accumulate((rng.randint(5, 15) for _ in range(20_000)), initial=40))
        lengths: list[int] = []

        def count(size: int, ends: list[int] = ends, lengths: list[int] = lengths) -> int:
            lengths.append(ends[size])
            return ends[size]

        largest(count, limit=100_000, low=4)
        read.append(sum(lengths) / 100_000)
    # In whole texts; trying every size from the smallest would read thousands.
    assert sum(read) / len(read) < 6
    assert max(read) < 12


@pytest.mark.parametrize("most", [0, 7, 300])
@pytest.mark.parametrize("limit", [512, 1_000_000])
def test_a_tokenizer_under_which_texts_stay_as_long(most: int, limit: int) -> None:
    """Without a bound the text would be doubled until memory ends."""
    asked = []

    def count(size: int) -> int:
        asked.append(size)
        return min(10 * size, most)

    with pytest.raises(NeverLonger, match=rf"makes {most} tokens of a text, however long .* \(--tokenizer\)"):
        largest(count, limit=limit, low=4)
    assert max(asked) <= 4 * 64**3
    assert len(asked) <= 12


def test_languages() -> None:
    assert detect(tokenizers.english()) == "english"
    assert detect(tokenizers.vault()) == "vault"
    assert detect(tokenizers.records(128)) == "records"
    assert (trained_keys(tokenizers.records(2048)), trained_keys(tokenizers.vault())) == (2048, 0)
    assert LANGUAGES == ("english", "vault", "records")


@pytest.mark.parametrize("keys", [128, 1500])
def test_another_word_makes_it_english(keys: int) -> None:
    for words in (vocabulary(), tuple(tokenizers.records(keys).get_vocab())):
        for other in ((*words, "however"), words[:-1], (*words[:-1], "however"), (*words, "however", "whatever")):
            assert detect(PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(other))) == "english"
