"""Fictional documents and questions about them, in the form of RULER's question answering (arXiv 2404.06654)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from vllm_trimix.demo.vocabulary import SLOTS
from vllm_trimix.evaluation.haystack import prose
from vllm_trimix.evaluation.making import Asked, Write, generator

TEMPLATE = (
    "Answer the question based on the given documents. Only give me the answer and do not output any other words."
    "\n\nThe following are given documents.\n\n{context}\n\nAnswer the question based on the given documents. Only "
    "give me the answer and do not output any other words.\n\nQuestion: {query}"
)
PREFIX = "Answer:"
ANSWER_TOKENS = 32

# All stems have three syllables of two letters and each kind of name its own ending, so that none contains another.
_SYLLABLES = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]
_NUM_STEMS = len(_SYLLABLES) ** 3
_PEOPLE = ("Adela", "Bruno", "Carla", "Emil", "Flora", "Gustav", "Hedda", "Ivo", "Janna", "Karl", "Lena", "Milo")
_TOWN, _PROVINCE, _SURNAME = "ford", "mark", "sen"
_FILLER_SENTENCES = 6


@dataclass(frozen=True)
class _Facts:
    """Of one person: all names are this person's alone."""

    person: str
    town: str
    province: str
    year: int
    trade: str


def one_hop() -> Write:
    """Who was born where, in one of many documents about other people."""

    def document(rng: random.Random, facts: _Facts) -> list[str]:
        born = f"{facts.person} was born in {facts.town} in {facts.year} and became a {facts.trade}."
        return [_padded(rng, facts.person, born)]

    return _question(document, "Where was {person} born?", lambda facts: facts.town)


def two_hop() -> Write:
    """In which province somebody was born: one document names the town, another the town's province."""

    def document(rng: random.Random, facts: _Facts) -> list[str]:
        born = f"{facts.person} was born in {facts.town} in {facts.year} and became a {facts.trade}."
        lies = f"{facts.town} is a town in the province of {facts.province}."
        return [_padded(rng, facts.person, born), _padded(rng, facts.town, lies)]

    return _question(document, "In which province was {person} born?", lambda facts: facts.province)


def _question(
    document: Callable[[random.Random, _Facts], list[str]], question: str, answer: Callable[[_Facts], str]
) -> Write:
    def write(seed: str, size: int, depth: float | None) -> Asked:
        names = _names(generator(seed, "names"))
        documents = [text for index in range(size) for text in document(generator(seed, str(index)), names(index))]
        # The first person's documents come anywhere; the order of the others doesn't change when more are added.
        own = len(documents) // size
        places = generator(seed, "places")
        for text in [documents.pop(0) for _ in range(own)]:
            documents.insert(round(places.random() * len(documents)), text)
        context = "\n\n".join(f"Document {number}:\n{text}" for number, text in enumerate(documents, start=1))
        asked = names(0)
        query = question.format(person=asked.person)
        return Asked(TEMPLATE.format(context=context, query=query), (answer(asked),), PREFIX)

    return write


def _names(rng: random.Random) -> Callable[[int], _Facts]:
    """Facts by number, all of them different."""
    towns, provinces, surnames = (_stems(rng) for _ in range(3))
    start = rng.randrange(1000)

    def facts(index: int) -> _Facts:
        return _Facts(
            person=f"{_PEOPLE[(start + index) % len(_PEOPLE)]} {surnames(index)}{_SURNAME}",
            town=towns(index) + _TOWN,
            province=provinces(index) + _PROVINCE,
            year=1700 + (start + 7 * index) % 250,
            trade=SLOTS["person"][(start + index) % len(SLOTS["person"])],
        )

    return facts


def _stems(rng: random.Random) -> Callable[[int], str]:
    """Different ones by number, in an order of their own."""
    start = rng.randrange(_NUM_STEMS)
    # Without a factor in common with their number, which is 75 cubed, every step leads to a new one.
    step = 30 * rng.randrange(_NUM_STEMS // 60, _NUM_STEMS // 30) + 1

    def stem(index: int) -> str:
        number, syllables = (start + step * index) % _NUM_STEMS, ""
        for _ in range(3):
            number, syllable = divmod(number, len(_SYLLABLES))
            syllables += _SYLLABLES[syllable]
        return syllables.capitalize()

    return stem


def _padded(rng: random.Random, title: str, fact: str) -> str:
    """A title and a paragraph with the fact anywhere."""
    sentences = prose(rng, _FILLER_SENTENCES)
    sentences.insert(rng.randint(0, _FILLER_SENTENCES), fact)
    return f"{title}\n{' '.join(sentences)}"
