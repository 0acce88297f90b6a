"""Files of prompts as people have them: JSON lines, an array, or objects one after the other, in any layout."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from vllm_trimix.probing.prompt_forms import CONTEXTS, Entry, Given, fields, prompts_of
from vllm_trimix.untrusted import read_text as decoded
from vllm_trimix.untrusted import reason

SUFFIXES = (".json", ".jsonl", ".ndjson", ".jsonlines")
_LISTS = ("data", "prompts", "examples", "samples", "rows", "instances", "questions", "test", "train")
_LINES, _ARRAY = "(json.loads(line) for line in {file} if line.strip())", "json.load({file})"


def read(path: Path, *, answers: bool, flag: str = "--prompts") -> list[Given]:
    """The prompts of a file.

    Args:
        path: JSON lines, or JSON objects in an array or one after the other.
        answers: Whether every prompt needs an answer.
        flag: What named the file.

    Raises:
        ValueError: Not UTF-8 or JSON, or an object that isn't a prompt, with file and line.
        OSError: The file can't be read.
    """
    text = decoded(path, f"{flag}: {path}")
    found = []
    for entry in _entries(text, f"{flag}: {path}"):
        for given in prompts_of(entry, path):
            if answers and not given.answer:
                raise ValueError(
                    f'{given.where}: there is no answer: write it as "answer" (a text); found {fields(entry.value)}'
                )
            for said in (given.text or "", given.answer, json.dumps(given.messages, ensure_ascii=False)):
                _check_characters(said, given.where)
            found.append(given)
    if not found:
        raise ValueError(f"{flag}: {path} holds no prompts")
    return found


def is_json(path: Path) -> bool:
    """Whether a file holds objects, by its name or by what it begins with; otherwise it is a plain text."""
    if path.suffix.lower() in SUFFIXES:
        return True
    with path.open("rb") as file:
        start = file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n")
    return re.match(rb'(\[\s*)?\{\s*"', start) is not None


def _entries(text: str, label: str) -> list[Entry]:
    """The objects of a file, whatever their layout."""
    # Only these end lines: a text may hold all else that Unicode calls a line's end. None may stand inside of a string.
    lines = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
    found: list[Entry] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            if not found:
                return _whole("\n".join(lines), label)
            raise ValueError(f"{label}, line {number}: not JSON: {reason(error)}") from None
        found.append(Entry(f"{label}, line {number}", value, _LINES))
    return _unpacked(found[0].value, label, found) if len(found) == 1 else found


def _whole(text: str, label: str) -> list[Entry]:
    """Objects over several lines, in an array or one after the other."""
    decoder, place, found = json.JSONDecoder(), 0, []
    while place < len(text):
        place = len(text) - len(text[place:].lstrip())
        if place == len(text):
            break
        number = text.count("\n", 0, place) + 1
        try:
            value, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            raise ValueError(f"{label}, line {error.lineno}: not JSON: {reason(error)}") from None
        except RecursionError:
            raise ValueError(f"{label}, line {number}: is nested too deeply") from None
        found.append(Entry(f"{label}, line {number}", value, "[json.load({file})]"))
    return _unpacked(found[0].value, label, found) if len(found) == 1 else found


def _unpacked(value: Any, label: str, otherwise: list[Entry]) -> list[Entry]:
    """The items of an array, or of an object that only holds one."""
    if isinstance(value, list):
        return [Entry(f"{label}, item {number}", item, _ARRAY) for number, item in enumerate(value, start=1)]
    if isinstance(value, dict) and not {*CONTEXTS, "prompt", "messages", "input", "question"} & value.keys():
        for name in _LISTS:
            items = value.get(name)
            if isinstance(items, list) and items and all(isinstance(item, dict) for item in items):
                source = f"{_ARRAY}[{json.dumps(name)}]"
                return [Entry(f"{label}, {name} {number}", item, source) for number, item in enumerate(items, start=1)]
    return otherwise


def _check_characters(text: str, where: str) -> None:
    """Refuses what no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: holds half a character (\\u{ord(text[error.start]):04x}), which is no Unicode text; remove it"
        ) from None
