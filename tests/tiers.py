"""The tiers of the test matrix: what each ran, as ``build/tiers.json``.

A test of a tier is marked ``@pytest.mark.tier("A")``, asks for the fixture ``tier``, and reports each case that it
checked: ``tier.case("gqa4", seed, triangle=True)``. Cases are told apart by their key; facts are what a tier must have
seen often enough to mean something.
"""

from __future__ import annotations

import hashlib
import json
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
    "K": "families of models",
    "L": "pretrained models",
}
FACTS = ("triangle", "straddling", "cached", "resumed")
"""Whether a case has triangle rows, last rows that straddle a chunk, cached prompt rows, rows of a resumed request."""
_DIGEST = 8
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
        # By digest of the key: whether each fact applies, and whether it holds, a bit each.
        self._cases: dict[bytes, int] = {}
        self.seconds, self.failures = 0.0, 0

    def size(self, *, sample: int, full: int) -> int:
        """Cases to run: a sample in the fast tests, all in the slow ones."""
        return full if self._full else sample

    def case(self, *key: object, **facts: bool) -> None:
        """Counts a case that was checked, once for each key; facts that can't apply to it are left out."""
        bits = 0
        for fact, holds in facts.items():
            if fact not in FACTS:
                raise ValueError(f"fact {fact!r} is none of {FACTS}")
            bits |= (1 | bool(holds) << len(FACTS)) << FACTS.index(fact)
        self._cases.setdefault(hashlib.blake2b(repr(key).encode(), digest_size=_DIGEST).digest(), bits)

    def pack(self) -> dict[str, Any]:
        """All of it in plain types, for another process."""
        cases = b"".join(digest + bytes([bits]) for digest, bits in self._cases.items())
        return {"cases": cases, "seconds": self.seconds, "failures": self.failures}

    def add(self, packed: dict[str, Any]) -> None:
        """Takes in what another process packed of the same tier."""
        cases, size = packed["cases"], _DIGEST + 1
        for start in range(0, len(cases), size):
            self._cases.setdefault(cases[start : start + _DIGEST], cases[start + _DIGEST])
        self.seconds += packed["seconds"]
        self.failures += packed["failures"]

    def as_json(self) -> dict[str, Any]:
        """For ``build/tiers.json``."""
        shares = {}
        for number, fact in enumerate(FACTS):
            applies, holds = 1 << number, 1 << number + len(FACTS)
            applicable = sum(bool(bits & applies) for bits in self._cases.values())
            if applicable:
                shares[fact] = round(sum(bool(bits & holds) for bits in self._cases.values()) / applicable, 4)
        return {
            "what": TIERS[self.name],
            "cases": len(self._cases),
            "seconds": round(self.seconds, 1),
            "failures": self.failures,
            "full": self._full,
            "shares": shares,
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
