"""Whether long answers keep the form that was asked for; each check gives the share that is right, 0 to 1."""

from __future__ import annotations

import json
import re


def copied_records(answer: str, references: tuple[str, ...]) -> float:
    """Share of the values in the references, JSON objects, that the answer's lines repeat, each in its place."""
    lines = answer.strip().splitlines()
    return sum(map(_values_kept, lines, references)) / len(references)


def _values_kept(line: str, reference: str) -> float:
    try:
        said = json.loads(line)
    except (ValueError, RecursionError):
        return 0.0
    wanted = json.loads(reference)
    return sum(said.get(key) == value for key, value in wanted.items()) / len(wanted) if isinstance(said, dict) else 0.0


def numbered_lines(answer: str, references: tuple[str, ...]) -> float:
    """Share of the answer's lines that carry the next number, the first that of the only reference.

    The last line doesn't count, as it may be cut, unless it is the only one.
    """
    lines = [line.strip() for line in answer.strip().splitlines() if line.strip()]
    lines = lines[:-1] or lines
    expected = int(references[0])
    right = 0
    for line in lines:
        if re.match(rf"{expected}[.)] ?\S", line):
            right, expected = right + 1, expected + 1
    return right / len(lines) if lines else 0.0


def headings(answer: str, references: tuple[str, ...]) -> float:
    """Share of the references that stand at the beginning of lines, one after the other in their order."""
    lines = [line.strip().lstrip("#* ").lower() for line in answer.splitlines()]
    right = place = 0
    for reference in references:
        found = next((i for i, line in enumerate(lines[place:], place) if line.startswith(reference.lower())), None)
        if found is None:
            break
        right, place = right + 1, found + 1
    return right / len(references)
