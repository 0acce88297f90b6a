"""Prompts with a known answer: records and aliases strewn in filler, of any length to the token."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
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

BOS_TOKENS = 1
STATEMENT_TOKENS = 8  # A record or an alias.
_VALUE_OFFSET = 6  # From a statement's first token to its code or second name.
QUESTION_TOKENS = 6
_MENTION_TOKENS = len(MENTION_TEMPLATE.split())
_DISTRACTORS = range(4, 41)
_TOKENS_PER_DISTRACTOR = 40

# BOS and the opening filler sentence cover the sinks, so that no statement is visible to every row.
FIRST_STATEMENT = Triangle.n_init + 1
# The alias's row must see the record only through the Middle Q-K section.
_MIN_HOP = Triangle.n_local + Triangle.last_n + 1
# From the alias's first token to the end: its second name is not among the dense last rows.
_MIN_AFTER_ALIAS = Triangle.last_n + _VALUE_OFFSET + 1
_AFTER_RECORD = STATEMENT_TOKENS + QUESTION_TOKENS

MIN_TOKENS = {
    1: FIRST_STATEMENT + _DISTRACTORS[0] * STATEMENT_TOKENS + _MENTION_TOKENS + MIN_FILLER_TOKENS + _AFTER_RECORD,
    2: FIRST_STATEMENT + _MIN_HOP + _MIN_AFTER_ALIAS,
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
    seed: int | str
    question: str


def make_demo_prompt(*, tokens: int, hops: int, seed: int | str, depth: float | None = None) -> DemoPrompt:
    """Writes the prompt of exactly this many tokens that the seed names.

    Args:
        tokens: Length, BOS included.
        hops: 1 or 2.
        seed: Names the prompt among those with the other arguments.
        depth: Where the record of the answer lies, from 0, the first place it may have, to 1, the last; None draws it.

    Raises:
        ValueError: hops is neither 1 nor 2, depth is outside 0-1, or tokens leaves no room for the document.
    """
    if hops not in MIN_TOKENS:
        raise ValueError(f"hops: {hops} is not supported; choose 1 (a record) or 2 (an alias and its record)")
    if tokens < MIN_TOKENS[hops]:
        raise ValueError(
            f"tokens: {tokens} is too short for a {hops}-hop document; the minimum is {MIN_TOKENS[hops]} tokens"
        )
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth: {depth} is outside 0-1; 0 is the document's beginning, 1 its end")
    rng = random.Random(f"{tokens} {hops} {seed}" + ("" if depth is None else f" {depth:g}"))
    names = rng.sample(NAMES, len(NAMES))
    codes = [str(code) for code in rng.sample(CODES, len(NAMES))]
    key, other = names.pop(), names.pop()
    answer = codes.pop()

    if hops == 1:
        statements = [record(key, answer)]
        starts = [record_start(rng, tokens, depth)]
    else:
        statements = [record(other, answer), alias(key, other)]
        starts = _hop_starts(rng, tokens, depth)
    text = lay_out(
        rng,
        tokens=tokens,
        placed=list(zip(starts, statements, strict=True)),
        asked=key,
        mentions=(key, other),
        others=lambda count: _distractors(rng, names, codes, count),
        wanted=max(_DISTRACTORS[0], min(tokens // _TOKENS_PER_DISTRACTOR, _DISTRACTORS[-1])),
    )
    return DemoPrompt(
        prompt=text,
        answer=answer,
        wrong_answer=other if hops == 2 else None,
        hops=hops,
        tokens=BOS_TOKENS + count_tokens(text),
        seed=seed,
        question=question(key),
    )


def lay_out(
    rng: random.Random,
    *,
    tokens: int,
    placed: Sequence[tuple[int, str]],
    asked: str,
    mentions: tuple[str, str],
    others: Callable[[int], list[str]] = lambda _: [],
    wanted: int = 0,
) -> str:
    """A document of exactly ``tokens`` tokens, BOS included, with statements at given places and filler between.

    Args:
        rng: Where the randomness comes from.
        tokens: Length.
        placed: Positions, ascending, and the statements that begin there; the first is past the opening sentence.
        asked: The name that the question at the end asks for.
        mentions: Names of whom the filler talks before the first statement, and after it.
        others: That many other statements, strewn anywhere.
        wanted: Of those; fewer where there is no room.
    """
    starts = [start for start, _ in placed]
    ends = [start + STATEMENT_TOKENS for start in starts]
    gaps = [end - begin for begin, end in zip([BOS_TOKENS, *ends], [*starts, tokens - QUESTION_TOKENS], strict=True)]
    shares = _share(rng, wanted, gaps) if wanted else [0] * len(gaps)
    distractors = others(sum(shares))
    sentences: list[str] = []
    for index, (gap, share) in enumerate(zip(gaps, shares, strict=True)):
        strewn, distractors = distractors[:share], distractors[share:]
        sentences += _passage(rng, gap, strewn, mention=mentions[index > 0], opening=index == 0)
        sentences += [statement for _, statement in placed[index : index + 1]]
    return " ".join([*sentences, question(asked)])


def record_start(rng: random.Random, tokens: int, depth: float | None = None) -> int:
    """Past the sinks, at a depth or anywhere; the rest is empty or long enough for a filler sentence."""
    last = tokens - _AFTER_RECORD
    free = last - MIN_FILLER_TOKENS
    start = rng.randint(FIRST_STATEMENT, free + 1) if depth is None else _between(FIRST_STATEMENT, last, depth)
    return last if start > free else start


def _hop_starts(rng: random.Random, tokens: int, depth: float | None) -> list[int]:
    """The record early, the alias out of its reach and out of the last rows."""
    slack = tokens - MIN_TOKENS[2]
    if depth is None:
        start = FIRST_STATEMENT + rng.randint(0, slack // 2)
    else:
        start = _between(FIRST_STATEMENT, FIRST_STATEMENT + slack, depth)
    return [start, rng.randint(start + _MIN_HOP, tokens - _MIN_AFTER_ALIAS)]


def _between(first: int, last: int, depth: float) -> int:
    return first + round(depth * (last - first))


def _room(index: int, gap: int) -> int:
    """Distractors that fit in a gap beside the opening sentence and one filler sentence that fits exactly."""
    opening = FIRST_STATEMENT - BOS_TOKENS if index == 0 else 0
    return max(0, gap - opening - _MENTION_TOKENS - MIN_FILLER_TOKENS) // STATEMENT_TOKENS


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
    length -= len(statements) * STATEMENT_TOKENS
    fillers: list[str] = []
    if opening:
        size, template = rng.choice(_fitting(length, least=FIRST_STATEMENT - BOS_TOKENS))
        fillers.append(filler_sentence(rng, template))
        length -= size
    if fillable(length - _MENTION_TOKENS):
        fillers.append(filler_sentence(rng, MENTION_TEMPLATE.replace("{name}", mention)))
        length -= _MENTION_TOKENS
    while length:
        size, template = rng.choice(_fitting(length))
        fillers.append(filler_sentence(rng, template))
        length -= size
    first = fillers[: int(opening)]
    rest = fillers[len(first) :]
    turns = [iter(statements)] * len(statements) + [iter(rest)] * len(rest)
    rng.shuffle(turns)
    return first + [next(turn) for turn in turns]


def fillable(length: int) -> bool:
    """Whether filler can have exactly this many tokens."""
    return length == 0 or length >= MIN_FILLER_TOKENS


def _fitting(length: int, *, least: int = 0) -> list[tuple[int, str]]:
    """Filler templates of at least ``least`` tokens that leave nothing, or room for another sentence."""
    return [(size, template) for size, template in _FILLERS if size >= least and fillable(length - size)]


def filler_sentence(rng: random.Random, template: str) -> str:
    """Fills a template's slots and joins its tokens as prose."""
    words = [rng.choice(SLOTS[piece[1:-1]]) if piece.startswith("{") else piece for piece in template.split()]
    text = " ".join(words).replace(" .", ".").replace(" ,", ",")
    return text[0].upper() + text[1:]
