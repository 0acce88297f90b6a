"""Prose to hide things in, and RULER's needles (arXiv 2404.06654): the template as published, with keys and values."""

from __future__ import annotations

import random
from collections.abc import Sequence

from vllm_trimix.demo.prompts import filler_sentence
from vllm_trimix.demo.vocabulary import FILLER_TEMPLATES, SLOTS
from vllm_trimix.evaluation.making import Asked, Write, generator
from vllm_trimix.measurement.prompt_text import draw_uuid

TEMPLATE = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the {kind} afterwards.\n{context}\nWhat are all the special magic {kind} for {query} mentioned in the provided "
    "text?"
)
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
PREFIX = "The special magic {kind} for {query} mentioned in the provided text are"
ANSWER_TOKENS = 128

_ADJECTIVES = (*SLOTS["adj"], *SLOTS["quality"])
_NOUNS = (*SLOTS["person"], *SLOTS["thing"], *SLOTS["place"])


def prose(rng: random.Random, sentences: int) -> list[str]:
    """Sentences about a village; more of them begin with the same ones."""
    return [filler_sentence(rng, rng.choice(FILLER_TEMPLATES)) for _ in range(sentences)]


def needles(*, kind: str = "numbers", keys: int = 1, values: int = 1, queries: int = 1) -> Write:
    """RULER's multi-needle task in prose.

    Args:
        kind: Of the values: seven-digit ``numbers``, or ``uuids``.
        keys: Words with values.
        values: Of each key.
        queries: Keys that are asked for.
    """

    def write(seed: str, size: int, depth: float | None) -> Asked:
        rng = generator(seed, "needles")
        chosen = _keys(rng, keys)
        drawn = {key: tuple(_value(rng, kind) for _ in range(values)) for key in chosen}
        statements = [NEEDLE.format(kind=kind, key=key, value=value) for key in chosen for value in drawn[key]]
        rng.shuffle(statements)
        depths = sorted(rng.random() for _ in statements) if depth is None else [depth] * len(statements)
        asked = rng.sample(chosen, queries)
        context = " ".join(strew(prose(generator(seed, "prose"), size), statements, depths))
        template, prefix, word = TEMPLATE, PREFIX, kind
        if queries * values == 1:
            # RULER's own way to the singular.
            template = template.replace("Some", "A").replace("are all", "is").replace("are", "is")
            prefix, word = prefix.removesuffix("are") + "is", kind.removesuffix("s")
        query = ", ".join(asked[:-1]) + ", and " + asked[-1] if queries > 1 else asked[0]
        return Asked(
            template.format(kind=word, context=context, query=query),
            tuple(value for key in asked for value in drawn[key]),
            prefix.format(kind=word, query=query),
        )

    return write


def strew(sentences: Sequence[str], statements: Sequence[str], depths: Sequence[float]) -> list[str]:
    """Statements among sentences, at depths from 0, before all of them, to 1, after them; depths ascend."""
    mixed: list[str] = []
    done = 0
    for statement, depth in zip(statements, depths, strict=True):
        place = round(depth * len(sentences))
        mixed += [*sentences[done:place], statement]
        done = place
    return [*mixed, *sentences[done:]]


def _keys(rng: random.Random, count: int) -> list[str]:
    """Different words; no noun comes twice, so that none contains another."""
    return [f"{rng.choice(_ADJECTIVES)}-{noun}" for noun in rng.sample(_NOUNS, count)]


def _value(rng: random.Random, kind: str) -> str:
    return draw_uuid(rng) if kind == "uuids" else str(rng.randint(1_000_000, 9_999_999))
