"""Whether long answers keep the form that was asked for; each check gives the share that is right, 0 to 1."""

from __future__ import annotations

import re


def copied_lines(answer: str, references: tuple[str, ...]) -> float:
    """Share of the references that the answer's lines repeat, each in its place."""
    lines = [line.strip() for line in answer.strip().splitlines()]
    return sum(line == reference for line, reference in zip(lines, references, strict=False)) / len(references)


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
