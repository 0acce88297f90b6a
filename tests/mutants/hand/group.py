"""What the lists of mutants by hand are made of."""

from __future__ import annotations

from typing import NamedTuple

ADMISSION = "tests/backend/test_admission.py"
SELECTION = "tests/patterns/test_selection.py"


class Group(NamedTuple):
    """Mutants of one file with the same tests: name, old text, new text."""

    path: str
    tests: tuple[str, ...]
    defects: tuple[tuple[str, str, str], ...]
