"""The tiers of the test matrix: what each ran, as ``build/tiers.json``.

A test of a tier is marked ``@pytest.mark.tier("A")``, asks for the fixture ``tier``, and reports each case that it
checked: ``tier.case("gqa4", seed, triangle=True)``. Cases are told apart by their key; facts are what a tier must have
seen often enough to mean something.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from pathlib import Path
from typing import Any

TIERS = {
    "A": "plan against a brute-force oracle",
    "B": "CPU numerics against fp64",
    "C": "Triton kernels, interpreted",
    "D": "metamorphic: what must not change the result",
    "E": "64-bit addressing",
    "F": "engine configurations",
    "G": "mutants",
    "H": "load and faults",
    "I": "hostile input",
    "J": "another backend selected",
}
FACTS = ("triangle", "straddling", "cached", "resumed")
"""Whether a case has triangle rows, last rows that straddle a chunk, cached prompt rows, rows of a resumed request."""
MIN_SHARE = 0.1
"""Of the cases to which a fact applies it must hold in this share at least."""


class Tier:
    """What one tier checked in this session.

    Attributes:
        seconds: In its tests.
        failures: Of its tests.
    """

    def __init__(self, name: str, *, full: bool) -> None:
        self.name, self._full = name, full
        self._seen: set[bytes] = set()
        self._facts: Counter[str] = Counter()
        self._applicable: Counter[str] = Counter()
        self.seconds, self.failures = 0.0, 0

    def size(self, *, sample: int, full: int) -> int:
        """Cases to run: a sample in the fast tests, all in the slow ones."""
        return full if self._full else sample

    def case(self, *key: object, **facts: bool) -> None:
        """Counts a case that was checked, once for each key; facts that can't apply to it are left out."""
        digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
        if digest in self._seen:
            return
        self._seen.add(digest)
        for fact, holds in facts.items():
            if fact not in FACTS:
                raise ValueError(f"fact {fact!r} is none of {FACTS}")
            self._applicable[fact] += 1
            self._facts[fact] += holds

    def as_json(self) -> dict[str, Any]:
        """For ``build/tiers.json``."""
        return {
            "what": TIERS[self.name],
            "cases": len(self._seen),
            "seconds": round(self.seconds, 1),
            "failures": self.failures,
            "full": self._full,
            "shares": {fact: round(self._facts[fact] / count, 4) for fact, count in self._applicable.items()},
        }


def shortcomings(entry: dict[str, Any] | None) -> list[str]:
    """What makes a tier that ran mean less than it says, a line each.

    Args:
        entry: Of ``build/tiers.json``; None when the tier wrote none.
    """
    if entry is None or not entry["cases"]:
        return ["no case was checked: its tests are missing, skipped or report none"]
    return [
        f"'{fact}' holds in {share:.1%} of the cases that it applies to, less than {MIN_SHARE:.0%}"
        for fact, share in entry["shares"].items()
        if share < MIN_SHARE
    ]


def write(path: Path, tiers: dict[str, Tier]) -> None:
    """Puts the tiers that ran in place of what the file says of them."""
    found = json.loads(path.read_text()) if path.exists() else {}
    found.update({name: tier.as_json() for name, tier in tiers.items()})
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n")
