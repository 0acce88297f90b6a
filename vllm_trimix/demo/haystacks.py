"""One-hop questions in the demo language over haystacks of several kinds."""

from __future__ import annotations

import random
from itertools import pairwise

from vllm_trimix.demo.prompts import (
    BOS_TOKENS,
    FIRST_STATEMENT,
    QUESTION_TOKENS,
    STATEMENT_TOKENS,
    DemoPrompt,
    fillable,
    filler_sentence,
    lay_out,
    record_start,
)
from vllm_trimix.demo.vocabulary import CODES, FILLER_TEMPLATES, NAMES, count_tokens, question, record

_OPENINGS = [template for template in FILLER_TEMPLATES if len(template.split()) >= FIRST_STATEMENT - BOS_TOKENS]
_MIN_TOKENS = 64


def varied(*, tokens: int, records: int, seed: str) -> DemoPrompt:
    """``records`` records of different names anywhere in varied filler, exactly ``tokens`` tokens.

    Raises:
        ValueError: tokens leaves no room.
    """
    _check(tokens, least=_MIN_TOKENS * records)
    rng = random.Random(f"varied {tokens} {records} {seed}")
    (stranger, _), *facts = _facts(rng, records + 1)
    starts = [record_start(rng, tokens)]
    while len(starts) < records or any(not fillable(b - a - STATEMENT_TOKENS) for a, b in pairwise(starts)):
        starts = sorted(record_start(rng, tokens) for _ in range(records))
    key, answer = rng.choice(facts)
    placed = [(start, record(*fact)) for start, fact in zip(starts, facts, strict=True)]
    return _prompt(lay_out(rng, tokens=tokens, placed=placed, asked=key, mentions=(key, stranger)), key, answer, seed)


def repeated(*, tokens: int, seed: str) -> DemoPrompt:
    """One record anywhere among copies of one filler sentence; at most ``tokens`` tokens, less than one copy below.

    Raises:
        ValueError: tokens leaves no room.
    """
    _check(tokens, least=_MIN_TOKENS)
    rng = random.Random(f"repeated {tokens} {seed}")
    template = rng.choice(_OPENINGS)
    filler = filler_sentence(rng, template)
    copies = (tokens - BOS_TOKENS - STATEMENT_TOKENS - QUESTION_TOKENS) // len(template.split())
    [(key, answer)] = _facts(rng, 1)
    sentences = [filler] * copies
    # The opening sentence covers the sinks.
    sentences.insert(rng.randint(1, copies), record(key, answer))
    return _prompt(" ".join([*sentences, question(key)]), key, answer, seed)


def records_only(*, tokens: int, seed: str) -> DemoPrompt:
    """Nothing but records; at most ``tokens`` tokens, less than one record below.

    There are fewer names than long documents have records: others than the asked one are stated again.

    Raises:
        ValueError: tokens leaves no room.
    """
    _check(tokens, least=_MIN_TOKENS)
    rng = random.Random(f"records {tokens} {seed}")
    places = (tokens - BOS_TOKENS - QUESTION_TOKENS) // STATEMENT_TOKENS
    (key, answer), *others = _facts(rng, min(places, len(NAMES)))
    # Each at least once.
    stated = [*others, *rng.choices(others, k=places - 1 - len(others))]
    rng.shuffle(stated)
    # The first record covers the sinks.
    stated.insert(rng.randint(1, places - 1), (key, answer))
    return _prompt(" ".join([*(record(*fact) for fact in stated), question(key)]), key, answer, seed)


def _facts(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """Names with their codes, all different."""
    return list(zip(rng.sample(NAMES, count), map(str, rng.sample(CODES, count)), strict=True))


def _check(tokens: int, *, least: int) -> None:
    if tokens < least:
        raise ValueError(f"tokens: {tokens} is too short for the document; the minimum is {least} tokens")


def _prompt(text: str, key: str, answer: str, seed: str) -> DemoPrompt:
    tokens = BOS_TOKENS + count_tokens(text)
    return DemoPrompt(text, answer, wrong_answer=None, hops=1, tokens=tokens, seed=seed, question=question(key))
