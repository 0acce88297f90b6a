"""Failures that are known and explained: a file of ``KIND | WHAT | SAID | WHY`` lines."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path


@dataclass
class Known:
    """The file's lines, and which of them explained something.

    Attributes:
        lines: Kind, pattern of what fails, part of what is said, reason.
    """

    lines: list[tuple[str, str, str, str]]
    _used: set[int] = field(default_factory=set)

    def explains(self, kind: str, what: str, said: str) -> bool:
        """Whether a line explains that ``what`` failed so."""
        for index, (its_kind, pattern, part, _) in enumerate(self.lines):
            if its_kind == kind and fnmatchcase(what, pattern) and part in said:
                self._used.add(index)
                return True
        return False

    def unused(self) -> list[str]:
        """Lines that explained nothing."""
        return [" | ".join(line[:3]) for index, line in enumerate(self.lines) if index not in self._used]


def load(path: Path) -> Known:
    """Reads the file.

    Raises:
        ValueError: A line has other than four fields, or one is empty.
    """
    lines: list[tuple[str, str, str, str]] = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = [text.strip() for text in line.split("|")]
        if len(fields) != 4 or not all(fields):
            raise ValueError(f"{path.name}:{number}: {line!r} has not the four fields KIND | WHAT | SAID | WHY")
        lines.append((fields[0], fields[1], fields[2], fields[3]))
    return Known(lines)
