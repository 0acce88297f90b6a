"""Prompts as texts and tokens: special tokens, chat templates, texts that fill a length, key-value pairs."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

_GUESSES = 8


class NoRoom(ValueError):
    """Even the smallest text is longer than the limit.

    Attributes:
        shortest: Its tokens.
    """

    def __init__(self, shortest: int) -> None:
        super().__init__(f"the shortest has {shortest}")
        self.shortest = shortest


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt, with those that the tokenizer adds; a chat template brings its own."""
    bos = getattr(tokenizer, "bos_token", None)
    add = bos is None or not text.startswith(bos)
    # Not verbose: it would say that the text is longer than some models take.
    ids: list[int] = tokenizer(text, add_special_tokens=add, verbose=False).input_ids
    return ids


def templated(tokenizer: Any, messages: list[Any], *, where: str) -> str:
    """A conversation in the tokenizer's chat template, up to where the answer begins.

    Raises:
        ValueError: There is no template, or it refuses; the text begins with ``where``.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(f'{where}: this tokenizer has no chat template for "messages"; give the text as "prompt"')
    try:
        text: str = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses it: {error}") from None
    return text


def largest(count: Callable[[int], int], *, limit: int, low: int) -> int:
    """The largest size from ``low`` on whose text has at most ``limit`` tokens, by few long texts.

    Args:
        count: Tokens of the text of a size; grows with it, and nearly evenly.
        limit: Tokens.
        low: Smallest size that makes a text, at least 1.

    Raises:
        NoRoom: The text of size ``low`` is longer.
    """
    count = cache(count)
    first, shortest = low, count(low)
    if shortest > limit:
        raise NoRoom(shortest)
    last, high = 4 * low, None
    # A text of an eighth of the length tells well enough how large the whole is.
    for goal in (limit // 8, *[limit] * _GUESSES):
        length = count(last)
        if length <= limit:
            low = max(low, last)
        elif high is None or last < high:
            high = last
        if high == low + 1:
            return low
        wanted = last + int((goal - length) * (last - first) / max(1, length - shortest))
        last = max(low + 1, wanted if high is None else min(wanted, high - 1))
    step = 1
    while high is None or high - low > 1:
        middle = low + step if high is None else (low + high) // 2
        step *= 2
        if count(middle) <= limit:
            low = middle
        else:
            high = middle
    return low


def draw_uuid(rng: random.Random) -> str:
    """A random UUID."""
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def json_pairs(pairs: Iterable[tuple[str, str]], *, separator: str = ",\n ") -> str:
    """Key-value pairs as a JSON object."""
    return "{" + separator.join(f'"{key}": "{value}"' for key, value in pairs) + "}"
