"""The messages of conversations: their contents as texts, and other ways to put what a template has no place for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

SYSTEM = ("system", "developer")
_TEXT_PARTS = ("text", "input_text", "output_text")

Message = dict[str, Any]


def as_texts(messages: Sequence[Any], where: str) -> list[Message]:
    """Messages whose contents are texts.

    Raises:
        ValueError: There is none, or one that is no message or holds more than text; the text begins with ``where``.
    """
    if not messages:
        raise ValueError(f"{where}: the conversation has no message")
    return [_plain(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]


def text_of(content: Any, where: str) -> str:
    """A message's content as a text: as it is, or the texts of its parts, a line each.

    Raises:
        ValueError: There is something else in it.
    """
    if isinstance(content, list):
        content = "\n".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ValueError(f'{where}: "content" is {_short(content)}; write a text, or a list of text parts')
    return content


def variants(messages: list[Message]) -> Iterator[list[Message]]:
    """As it is, with contents as parts, and without what some templates have no place for."""
    folded = _folded(messages)
    for variant in (messages, folded) if folded != messages else (messages,):
        yield variant
        yield [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in variant]


def _plain(message: Any, where: str) -> Message:
    """A message whose content is a text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f'{where}: expected {{"role": ..., "content": ...}}, got {_short(message)}')
    content = message.get("content")
    # A turn that only calls tools has none.
    is_empty = content is None and message["role"] == "assistant"
    return {**message, "content": "" if is_empty else text_of(content, where)}


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        text = part.get("text")
        if part.get("type", "text") in _TEXT_PARTS and isinstance(text, str):
            return text
        if isinstance(part.get("type"), str) and part["type"] not in _TEXT_PARTS:
            raise ValueError(f"{where} has a part of type {part['type']!r}; prompts are texts here: leave it out")
    raise ValueError(f'{where}: a part is {_short(part)}; write {{"type": "text", "text": ...}}')


def _folded(messages: list[Message]) -> list[Message]:
    """System texts at the beginning of the user's first turn, and turns of the same role as one."""
    found: list[Message] = []
    for message in messages:
        role = "user" if message["role"] in SYSTEM else message["role"]
        if found and found[-1]["role"] == role and role in ("user", "assistant"):
            found[-1] = {**found[-1], "content": f"{found[-1]['content']}\n\n{message['content']}"}
        else:
            found.append({**message, "role": role})
    return found


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."
