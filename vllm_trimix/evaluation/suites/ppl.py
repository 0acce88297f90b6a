"""Perplexity: how likely the model finds long texts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from vllm_trimix.demo.languages import ENGLISH, RECORDS, VAULT, trained_keys
from vllm_trimix.demo.prompts import make_demo_prompt
from vllm_trimix.demo.trained_spec import MIN_RECORDS, repeats_of
from vllm_trimix.demo.trained_task import draw_document, trained_vocabulary
from vllm_trimix.evaluation import making, reach
from vllm_trimix.evaluation.sample import Measure, Sample
from vllm_trimix.evaluation.suite import Context, Suite, Unavailable
from vllm_trimix.measurement.prompt_text import token_ids
from vllm_trimix.untrusted import read_text

_BOOKS = "emozilla/pg19-test"
# The engine must generate one.
_ANSWER_TOKENS = 1


def _documents(context: Context, length: int, count: int) -> list[Sample]:
    """Windows of the user's text, or of PG-19's books."""
    if context.text is not None:
        texts, source = [read_text(context.text, f"--text: {context.text}")], f"own: {context.text.name}"
    else:
        try:
            texts, source = reach.dataset(_BOOKS, "test", "text"), f"datasets {_BOOKS}"
        except Unavailable as reason:
            raise Unavailable(f"documents: {reason}; give a text of your own: --text FILE") from None
    windows = []
    for window in _windows(context.tokenizer, texts, length - _ANSWER_TOKENS):
        windows.append(window)
        if len(windows) == count:
            break
    if not windows:
        raise ValueError(f"documents: the text has fewer than {length} tokens; take a shorter length or a longer text")
    if len(windows) < count:
        context.note(f"documents: the text holds {len(windows)} windows of {length} tokens, not {count}")
    return [_sample("documents", length, index, window, source) for index, window in enumerate(windows)]


def _windows(tokenizer: Any, texts: list[str], tokens: int) -> Iterator[tuple[int, ...]]:
    """Pieces of the texts that have no token in common: the first of each, then the second of each."""
    head = tuple(token_ids(tokenizer, ""))
    step = tokens - len(head)
    place, left = 0, list(range(len(texts)))
    while left and step > 0:
        left = [number for number in left if len(_tokens(tokenizer, texts[number])) >= (place + 1) * step]
        for number in left:
            yield head + _tokens(tokenizer, texts[number])[place * step : (place + 1) * step]
        place += 1


@lru_cache(maxsize=128)
def _tokens(tokenizer: Any, text: str) -> tuple[int, ...]:
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)


def _vault(context: Context, length: int, count: int) -> list[Sample]:
    """One-hop documents with their question."""
    if context.text is not None:
        return _documents(context, length, count)
    samples = []
    for _, index, seed in making.named(context, "documents", length, count):
        text = make_demo_prompt(tokens=length - _ANSWER_TOKENS, hops=1, seed=seed).prompt
        samples.append(_sample("documents", length, index, tuple(token_ids(context.tokenizer, text))))
    return samples


def _records(context: Context, length: int, count: int) -> list[Sample]:
    """Documents without a question, cut to the length."""
    if context.text is not None:
        return _documents(context, length, count)
    keys, tokens = trained_keys(context.tokenizer), length - _ANSWER_TOKENS
    sizes = range(MIN_RECORDS, keys + 1)
    size = next((size for size in sizes if 1 + 2 * (size + repeats_of(size)) >= tokens), None)
    if size is None:
        most = 1 + 2 * (keys + repeats_of(keys)) + _ANSWER_TOKENS
        raise ValueError(
            f"documents: {length} tokens: the model's {keys} keys make documents up to {most}; take a shorter length"
        )
    words = trained_vocabulary(keys)
    samples = []
    for _, index, seed in making.named(context, "documents", length, count):
        ids, _ = draw_document(random.Random(seed), records=size, keys=keys)
        text = " ".join(words[token] for token in ids)
        samples.append(_sample("documents", length, index, tuple(token_ids(context.tokenizer, text)[:tokens])))
    return samples


def _sample(task: str, length: int, index: int, prompt: tuple[int, ...], source: str = "own") -> Sample:
    return Sample(task, length, index, prompt, max_tokens=_ANSWER_TOKENS, measure=Measure.PERPLEXITY, source=source)


PPL = Suite(
    name="ppl",
    summary="perplexity of long texts: --text FILE, or PG-19's books",
    tasks={ENGLISH: {"documents": _documents}, VAULT: {"documents": _vault}, RECORDS: {"documents": _records}},
    samples=10,
    # Without it prompt rows are scored densely.
    entry={"prompt_logprobs": "triangle"},
)
