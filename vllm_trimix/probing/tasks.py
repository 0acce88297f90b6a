"""Tasks with a known answer, from easy to hard, in each language that a model may speak."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from vllm_trimix.demo.languages import ENGLISH, RECORDS, VAULT
from vllm_trimix.demo.prompts import filler_sentence, make_demo_prompt
from vllm_trimix.demo.trained_task import make_trained_prompt, records_within
from vllm_trimix.demo.vocabulary import FILLER_TEMPLATES
from vllm_trimix.measurement.prompt_text import draw_uuid, json_pairs

_NEEDLE = "One of the special magic numbers for {city} is: {number}."
_NEEDLE_TEXT = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. I will quiz you about "
    "the numbers afterwards.\n{text}\nWhat is the special magic number for {city} mentioned in the provided text?"
)
_NEEDLE_PREFIX = "The special magic number for {city} mentioned in the provided text is"
_PASSKEY = "The pass key is {number}. Remember it. {number} is the pass key."
_PASSKEY_TEXT = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n{text}\nWhat is the pass key?"
)
_KV_TEXT = (
    "Extract the value corresponding to the specified key in the JSON object below.\n\n{pairs}\n\n"
    'Key: "{key}"\nWhat is the value of this key? Give the value only.'
)
_CITIES = (
    "Lisbon", "Oslo", "Nairobi", "Kyoto", "Quito", "Perth", "Tunis", "Riga", "Lima", "Hanoi", "Bergen", "Cork",
    "Dakar", "Turin", "Malmo", "Kazan", "Leeds", "Busan", "Accra", "Porto",
)  # fmt: skip
_LEAST_UNITS = 8


@dataclass(frozen=True)
class Question:
    """A text with a question and its answer.

    Attributes:
        text: A user's turn where the tokenizer has a chat template.
        prefix: The answer's beginning, so that only the answer itself is compared, not how a model likes to begin.
        answer: What the model should say next.
    """

    text: str
    prefix: str
    answer: str


@dataclass(frozen=True)
class Task:
    """A kind of question.

    Attributes:
        name: E.g. ``kv_retrieval``.
        write: The question of a random state and a size; the same state's grows with its size.
        sized_by_tokens: Whether sizes are tokens. Otherwise they are units, as many as fit.
    """

    name: str
    write: Callable[[random.Random, int], Question]
    sized_by_tokens: bool = False

    @property
    def least(self) -> int:
        """Smallest size that makes a text."""
        return _LEAST_UNITS


def _middle(rng: random.Random, size: int) -> int:
    """A place in the middle half, where rows are neither sinks nor last rows."""
    return rng.randrange(size // 4, size - size // 4)


def _prose(rng: random.Random, size: int) -> list[str]:
    return [filler_sentence(rng, rng.choice(FILLER_TEMPLATES)) for _ in range(size)]


def _needles(count: int) -> Callable[[random.Random, int], Question]:
    def write(rng: random.Random, size: int) -> Question:
        sentences = _prose(rng, size)
        cities = rng.sample(_CITIES, count)
        numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), count)]
        asked = count // 2
        places = [rng.randrange(size) for _ in cities]
        places[asked] = _middle(rng, size)
        order = sorted(range(count), key=lambda index: -places[index])
        for index in order:
            sentences.insert(places[index], _NEEDLE.format(city=cities[index], number=numbers[index]))
        city = cities[asked]
        text = _NEEDLE_TEXT.format(text=" ".join(sentences), city=city)
        return Question(text, _NEEDLE_PREFIX.format(city=city), f" {numbers[asked]}")

    return write


def _passkey(rng: random.Random, size: int) -> Question:
    sentences = _prose(rng, size)
    number = str(rng.randrange(10_000, 100_000))
    sentences.insert(_middle(rng, size), _PASSKEY.format(number=number))
    return Question(_PASSKEY_TEXT.format(text=" ".join(sentences)), "The pass key is", f" {number}")


def _kv_retrieval(rng: random.Random, size: int) -> Question:
    pairs = [(draw_uuid(rng), draw_uuid(rng)) for _ in range(size)]
    key, value = pairs[_middle(rng, size)]
    return Question(_KV_TEXT.format(pairs=json_pairs(pairs), key=key), 'The value of this key is "', value)


def _hops(hops: int) -> Callable[[random.Random, int], Question]:
    def write(rng: random.Random, tokens: int) -> Question:
        prompt = make_demo_prompt(tokens=tokens, hops=hops, seed=rng.getrandbits(64))
        return Question(prompt.prompt, "", prompt.answer)

    return write


def _record(keys: int) -> Callable[[random.Random, int], Question]:
    def write(rng: random.Random, tokens: int) -> Question:
        records = records_within("record", tokens, 1, keys)
        prompt = make_trained_prompt(records=records, seed=rng.getrandbits(64), keys=keys)
        return Question(prompt.prompt, "", prompt.answer)

    return write


MULTI_NEEDLE, KV_RETRIEVAL = Task("multi_needle", _needles(8)), Task("kv_retrieval", _kv_retrieval)


def tasks_of(language: str, *, keys: int = 0) -> tuple[Task, ...]:
    """The tasks that can be asked in a language, from easy to hard.

    Args:
        language: Of ``demo.languages``.
        keys: Of a trained model's vocabulary.
    """
    if language == VAULT:
        return tuple(Task(f"{hops}_hop", _hops(hops), sized_by_tokens=True) for hops in (1, 2))
    if language == RECORDS:
        return (Task("record", _record(keys), sized_by_tokens=True),)
    assert language == ENGLISH
    return (
        Task("needle", _needles(1)),
        Task("passkey", _passkey),
        Task("few_needles", _needles(3)),
        MULTI_NEEDLE,
        KV_RETRIEVAL,
    )
