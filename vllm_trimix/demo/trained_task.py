"""The task of the trained models: documents of key-value records, and questions about them.

A document is ``k012 v034 k007 v101 k012 v034 ... ? k007``, and its answer ``v101``. A record is a key and its value;
some records are stated again, and there a model can predict the value long before the question. Keys and values of a
document are distinct and drawn anew for each. One word is one token; BOS comes first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from functools import cache

from vllm_trimix.demo.trained_spec import MIN_RECORDS, SIZES, repeats_of, tokens_of
from vllm_trimix.demo.vocabulary import SPECIALS

ASK = "?"


@dataclass(frozen=True)
class Repeat:
    """A key in the prompt whose value the prompt has stated before.

    Attributes:
        position: Of the key; the value that follows it is the truth.
        earlier: Positions of the same value before it.
        value: The value.
    """

    position: int
    earlier: tuple[int, ...]
    value: str


@dataclass(frozen=True)
class TrainedPrompt:
    """A document with one question, the right answer, and where things are. Positions count BOS as 0.

    Attributes:
        prompt: The text, without BOS.
        answer: The value asked for.
        key_position: Of the asked record's key; its value comes right after.
        distance: From the asked value to the prompt's last token.
        repeats: The records that are stated again, none of them the asked one.
        tokens: Length including BOS.
    """

    prompt: str
    answer: str
    key_position: int
    distance: int
    repeats: tuple[Repeat, ...]
    tokens: int


@cache
def trained_vocabulary(keys: int) -> tuple[str, ...]:
    """All tokens in the order of their ids: specials, the question mark, keys, values."""
    digits = max(3, len(str(keys)))
    words = (f"{letter}{number:0{digits}}" for letter in "kv" for number in range(1, keys + 1))
    return (*SPECIALS, ASK, *words)


def make_trained_prompt(
    *, records: int, seed: int | str, distance: int | None = None, keys: int = SIZES["small"].keys
) -> TrainedPrompt:
    """Writes the prompt that the seed names.

    Args:
        records: Distinct keys of the document; a quarter as many repeats come on top.
        seed: Names the prompt among those with the other arguments.
        distance: From the asked value to the end of the prompt, even; None draws it.
        keys: Of the model's vocabulary.

    Raises:
        ValueError: Too few or too many records, or no record at that distance.
    """
    if not MIN_RECORDS <= records <= keys:
        raise ValueError(f"records: {records} is outside {MIN_RECORDS}-{keys}; the model has {keys} keys")
    rng = random.Random(f"{records} {seed} {distance} {keys}")
    places = records + repeats_of(records)
    if distance is None:
        asked = rng.randrange(places)
    elif distance % 2 or not 2 <= distance <= 2 * places:
        raise ValueError(f"distance: {distance} is not an even number of tokens from 2 to {2 * places}")
    else:
        asked = places - distance // 2
    ids, owners = draw_document(rng, records=records, keys=keys, asked=asked)
    words = [trained_vocabulary(keys)[index] for index in ids]
    repeats, earlier = [], dict[int, tuple[int, ...]]()
    for place, owner in enumerate(owners):
        position = 1 + 2 * place
        if owner in earlier:
            repeats.append(Repeat(position, earlier[owner], words[position]))
        earlier[owner] = (*earlier.get(owner, ()), position + 1)
    key, answer = words[2 * asked : 2 * asked + 2]
    return TrainedPrompt(
        prompt=" ".join([*words, ASK, key]),
        answer=answer,
        key_position=1 + 2 * asked,
        distance=2 * (places - asked),
        repeats=tuple(repeats),
        tokens=1 + len(words) + 2,
    )


def draw_document(
    rng: random.Random, *, records: int, keys: int, asked: int | None = None
) -> tuple[list[int], list[int]]:
    """Draws a document.

    Args:
        rng: Where the randomness comes from.
        records: Distinct keys.
        keys: Of the vocabulary.
        asked: A place that must hold a record which is stated nowhere else.

    Returns:
        Token ids, key and value by turns, without BOS; and for each place the number of the record it states.
    """
    first_key = len(SPECIALS) + 1
    names = rng.sample(range(first_key, first_key + keys), records)
    values = rng.sample(range(first_key + keys, first_key + 2 * keys), records)
    places = range(records + repeats_of(records))
    # The first place has nothing to repeat, and the second neither where the first is asked for.
    free = [place for place in places if place > (asked == 0) and place != asked]
    again = set(rng.sample(free, repeats_of(records)))
    ids: list[int] = []
    owners: list[int] = []
    stated: list[int] = []
    record = 0
    for place in places:
        if place in again:
            owner = rng.choice(stated)
        else:
            owner, record = record, record + 1
            if place != asked:
                stated.append(owner)
        owners.append(owner)
        ids += [names[owner], values[owner]]
    return ids, owners


def records_within(task: str, length: int, answer: int, keys: int) -> int:
    """Records of the longest document that leaves room for an answer of so many tokens.

    Raises:
        ValueError: There is none, or the model has too few keys for it.
    """
    size = MIN_RECORDS
    while tokens_of(size + 1) + answer <= length and size <= keys:
        size += 1
    if tokens_of(size) + answer > length:
        least = tokens_of(MIN_RECORDS) + answer
        raise ValueError(f"{task}: {length} tokens leave no room: the shortest document needs {least}")
    if size > keys:
        raise ValueError(
            f"{task}: {length} tokens: the model's {keys} keys make documents for lengths up to "
            f"{tokens_of(keys + 1) + answer - 1}; take a shorter one"
        )
    return size
