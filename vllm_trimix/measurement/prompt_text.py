"""Prompts as texts and tokens: special tokens, texts that fill a length, key-value pairs."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable, Iterable
from typing import Any

_GUESSES = 8
_STEP = 64


class NoRoom(ValueError):
    """Even the smallest text is longer than the limit.

    Attributes:
        shortest: Its tokens.
    """

    def __init__(self, shortest: int) -> None:
        super().__init__(f"the shortest has {shortest}")
        self.shortest = shortest


class NeverLonger(ValueError):
    """A tokenizer under which a text of more and more units gets no more tokens."""

    def __init__(self, size: int, tokens: int) -> None:
        super().__init__(
            f"the tokenizer makes {tokens} tokens of a text, however long it gets (so far {size} units): no text would "
            "fill the length; take the model's own, complete tokenizer (--tokenizer)"
        )


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Tokens of a prompt, with those that the tokenizer adds; a chat template brings its own."""
    bos = getattr(tokenizer, "bos_token", None)
    add = bos is None or not text.startswith(bos)
    # Not verbose: it would say that the text is longer than some models take.
    ids: list[int] = tokenizer(text, add_special_tokens=add, verbose=False).input_ids
    return ids


def largest(count: Callable[[int], int], *, limit: int, low: int) -> int:
    """The largest size from ``low`` on whose text has at most ``limit`` tokens, by few long texts.

    Args:
        count: Tokens of the text of a size; grows with it, and nearly evenly.
        limit: Tokens.
        low: Smallest size that makes a text, at least 1.

    Raises:
        NoRoom: The text of size ``low`` is longer.
        NeverLonger: Twice the text has no more tokens.
    """
    known: dict[int, int] = {}

    def growing(size: int) -> int:
        if size not in known:
            known[size] = tokens = counted(size)
            if any(2 * smaller <= size and tokens <= fewer for smaller, fewer in known.items()):
                raise NeverLonger(size, tokens)
        return known[size]

    counted, count = count, growing
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
        # By steps: a first guess from very short texts may be far too large.
        wanted = min(wanted, _STEP * max(known))
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
