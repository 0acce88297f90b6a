"""Prompts that need no known answer: pieces of texts that the user has, cut to a length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_trimix.measurement.prompt_text import token_ids
from vllm_trimix.untrusted import read_text


def pieces(
    paths: Sequence[Path], tokenizer: Any, *, length: int, count: int, seed: int | str, flag: str = "--lengths"
) -> list[tuple[int, ...]]:
    """Pieces of the texts in random order, side by side while there is room; more of them begin with the same.

    Args:
        paths: Text files.
        tokenizer: The model's.
        length: Of each piece, in tokens, those that begin a prompt included.
        count: How many.
        seed: Of the places.
        flag: What sets the length, for errors.

    Raises:
        ValueError: A file that isn't text, or all of them are shorter than the length.
        OSError: A file can't be read.
    """
    begin, texts = _beginning(tokenizer), []
    for path in paths:
        tokens = tokenizer(read_text(path, f"--documents: {path}"), add_special_tokens=False, verbose=False).input_ids
        texts.append(tuple(tokens))
    size = length - len(begin)
    usable = [text for text in texts if len(text) >= size]
    if not usable:
        longest = max((len(text) for text in texts), default=0)
        raise ValueError(
            f"{flag}: {length} tokens: the longest of the --documents has {longest}; take shorter ones or longer texts"
        )
    rng = random.Random(f"{seed} documents {length}")
    places = [(text, place) for text in usable for place in _places(rng, len(text), size)]
    rng.shuffle(places)
    while len(places) < count:
        text = rng.choice(usable)
        places.append((text, rng.randrange(len(text) - size + 1)))
    return [(*begin, *text[place : place + size]) for text, place in places[:count]]


def _places(rng: random.Random, tokens: int, size: int) -> range:
    """Beginnings of pieces side by side."""
    return range(rng.randrange(tokens % size + 1), tokens - size + 1, size)


def _beginning(tokenizer: Any) -> tuple[int, ...]:
    """What the tokenizer puts before a text."""
    bos = getattr(tokenizer, "bos_token_id", None)
    return (bos,) if bos is not None and token_ids(tokenizer, "a")[:1] == [bos] else ()
