"""Prompts with a known answer: records and aliases strewn in filler, of any length to the token."""

from __future__ import annotations

import random
from dataclasses import dataclass

from vllm_trimix.demo.vocabulary import (
    CODES,
    FILLER_TEMPLATES,
    MENTION_TEMPLATE,
    MIN_FILLER_TOKENS,
    NAMES,
    SLOTS,
    alias,
    count_tokens,
    question,
    record,
)
from vllm_trimix.patterns.triangle import Triangle

_BOS_TOKENS = 1
_STATEMENT_TOKENS = 8  # A record or an alias.
_VALUE_OFFSET = 6  # From a statement's first token to its code or second name.
_QUESTION_TOKENS = 6
_MENTION_TOKENS = len(MENTION_TEMPLATE.split())
_DISTRACTORS = range(4, 41)
_TOKENS_PER_DISTRACTOR = 40

# BOS and the opening filler sentence cover the sinks, so that no statement is visible to every row.
_FIRST_STATEMENT = Triangle.n_init + 1
# The alias's row must see the record only through the Middle Q-K section.
_MIN_HOP = Triangle.n_local + Triangle.last_n + 1
# From the alias's first token to the end: its second name is not among the dense last rows.
_MIN_AFTER_ALIAS = Triangle.last_n + _VALUE_OFFSET + 1
_AFTER_RECORD = _STATEMENT_TOKENS + _QUESTION_TOKENS

MIN_TOKENS = {
    1: _FIRST_STATEMENT + _DISTRACTORS[0] * _STATEMENT_TOKENS + _MENTION_TOKENS + MIN_FILLER_TOKENS + _AFTER_RECORD,
    2: _FIRST_STATEMENT + _MIN_HOP + _MIN_AFTER_ALIAS,
}

_FILLERS = tuple((len(template.split()), template) for template in FILLER_TEMPLATES)


@dataclass(frozen=True)
class DemoPrompt:
    """A prompt and what a right and a broken model say to it.

    Attributes:
        prompt: The text, without BOS.
        answer: The code asked for.
        wrong_answer: What a model says whose lookup layer lost the Middle Q-K section; None for one hop.
        hops: 1: the name asked for has a record. 2: it has an alias, whose other name has the record.
        tokens: Length including BOS, by the demo tokenizer.
        seed: Names the prompt among those of its length and hops.
        question: The last words of the prompt.
    """

    prompt: str
    answer: str
    wrong_answer: str | None
    hops: int
    tokens: int
    seed: int
    question: str


def make_demo_prompt(*, tokens: int, hops: int, seed: int) -> DemoPrompt:
    """Writes the prompt of exactly this many tokens that the seed names.

    Raises:
        ValueError: hops is neither 1 nor 2, or tokens leaves no room for the document.
    """
    if hops not in MIN_TOKENS:
        raise ValueError(f"hops: {hops} is not supported; choose 1 (a record) or 2 (an alias and its record)")
    if tokens < MIN_TOKENS[hops]:
        raise ValueError(
            f"tokens: {tokens} is too short for a {hops}-hop document; the minimum is {MIN_TOKENS[hops]} tokens"
        )
    rng = random.Random(f"{tokens} {hops} {seed}")
    names = rng.sample(NAMES, len(NAMES))
    codes = [str(code) for code in rng.sample(CODES, len(NAMES))]
    key, other = names.pop(), names.pop()
    answer = codes.pop()

    if hops == 1:
        statements = [record(key, answer)]
        starts = [_record_start(rng, tokens)]
    else:
        statements = [record(other, answer), alias(key, other)]
        starts = _hop_starts(rng, tokens)
    ends = [start + _STATEMENT_TOKENS for start in starts]
    gaps = [end - begin for begin, end in zip([_BOS_TOKENS, *ends], [*starts, tokens - _QUESTION_TOKENS], strict=True)]

    wanted = max(_DISTRACTORS[0], min(tokens // _TOKENS_PER_DISTRACTOR, _DISTRACTORS[-1]))
    shares = _share(rng, wanted, gaps)
    distractors = _distractors(rng, names, codes, sum(shares))
    sentences: list[str] = []
    for index, (gap, share) in enumerate(zip(gaps, shares, strict=True)):
        strewn, distractors = distractors[:share], distractors[share:]
        mention = key if index == 0 else other
        sentences += _passage(rng, gap, strewn, mention=mention, opening=index == 0)
        sentences += statements[index : index + 1]
    text = " ".join([*sentences, question(key)])
    return DemoPrompt(
        prompt=text,
        answer=answer,
        wrong_answer=other if hops == 2 else None,
        hops=hops,
        tokens=_BOS_TOKENS + count_tokens(text),
        seed=seed,
        question=question(key),
    )


def _record_start(rng: random.Random, tokens: int) -> int:
    """Anywhere past the sinks; the rest is empty or long enough for a filler sentence."""
    last = tokens - _AFTER_RECORD
    start = rng.randint(_FIRST_STATEMENT, last - MIN_FILLER_TOKENS + 1)
    return last if start > last - MIN_FILLER_TOKENS else start


def _hop_starts(rng: random.Random, tokens: int) -> list[int]:
    """The record early, the alias out of its reach and out of the last rows."""
    slack = tokens - MIN_TOKENS[2]
    start = _FIRST_STATEMENT + rng.randint(0, slack // 2)
    return [start, rng.randint(start + _MIN_HOP, tokens - _MIN_AFTER_ALIAS)]


def _room(index: int, gap: int) -> int:
    """Distractors that fit in a gap beside the opening sentence and one filler sentence that fits exactly."""
    opening = _FIRST_STATEMENT - _BOS_TOKENS if index == 0 else 0
    return max(0, gap - opening - _MENTION_TOKENS - MIN_FILLER_TOKENS) // _STATEMENT_TOKENS


def _share(rng: random.Random, wanted: int, gaps: list[int]) -> list[int]:
    """How many distractors each gap gets: by its length, never more than fit."""
    shares = [0] * len(gaps)
    for index in rng.choices(range(len(gaps)), weights=gaps, k=wanted):
        if shares[index] < _room(index, gaps[index]):
            shares[index] += 1
    return shares


def _distractors(rng: random.Random, names: list[str], codes: list[str], count: int) -> list[str]:
    """Records and aliases of other names; an alias names an earlier record."""
    statements: list[str] = []
    recorded: list[str] = []
    for name, code in zip(names[:count], codes, strict=False):
        if recorded and rng.random() < 0.4:
            statements.append(alias(name, rng.choice(recorded)))
        else:
            statements.append(record(name, code))
            recorded.append(name)
    return statements


def _passage(rng: random.Random, length: int, statements: list[str], *, mention: str, opening: bool) -> list[str]:
    """Filler of exactly ``length`` tokens with statements strewn in; a filler sentence comes first if ``opening``."""
    length -= len(statements) * _STATEMENT_TOKENS
    fillers: list[str] = []
    if opening:
        size, template = rng.choice(_fitting(length, least=_FIRST_STATEMENT - _BOS_TOKENS))
        fillers.append(_sentence(rng, template))
        length -= size
    if _fillable(length - _MENTION_TOKENS):
        fillers.append(_sentence(rng, MENTION_TEMPLATE.replace("{name}", mention)))
        length -= _MENTION_TOKENS
    while length:
        size, template = rng.choice(_fitting(length))
        fillers.append(_sentence(rng, template))
        length -= size
    first = fillers[: int(opening)]
    rest = fillers[len(first) :]
    turns = [iter(statements)] * len(statements) + [iter(rest)] * len(rest)
    rng.shuffle(turns)
    return first + [next(turn) for turn in turns]


def _fillable(length: int) -> bool:
    return length == 0 or length >= MIN_FILLER_TOKENS


def _fitting(length: int, *, least: int = 0) -> list[tuple[int, str]]:
    """Filler templates of at least ``least`` tokens that leave nothing, or room for another sentence."""
    return [(size, template) for size, template in _FILLERS if size >= least and _fillable(length - size)]


def _sentence(rng: random.Random, template: str) -> str:
    """Fills a template's slots and joins its tokens as prose."""
    words = [rng.choice(SLOTS[piece[1:-1]]) if piece.startswith("{") else piece for piece in template.split()]
    text = " ".join(words).replace(" .", ".").replace(" ,", ",")
    return text[0].upper() + text[1:]
