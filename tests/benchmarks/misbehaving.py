"""Tasks and preparations of worker processes that go wrong; imports nothing heavy, for each process imports it."""

from __future__ import annotations

import os
import time


def misbehave(how: str) -> int:
    """Does what its argument says, or returns the number of its process."""
    if how == "abort":
        os.abort()
    if how == "exit":
        os._exit(77)
    if how == "hang":
        time.sleep(60)
    if how == "raise":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    return os.getpid()


def pass_slowly(case: object, device: str) -> dict[str, object]:
    """In place of an attempt at a case; without a launch."""
    time.sleep(0.4)
    return {"error": "", "of_budget": 0.5, "seconds": {"run": 0.1}, "variants": [{"hash": "abc", "registers": 9}]}


def nothing() -> None:
    """A preparation, or a check, that passes."""


def spoilt() -> None:
    """A check that fails."""
    raise RuntimeError("the context is gone")


def die() -> None:
    """A preparation that ends its process."""
    os._exit(3)
