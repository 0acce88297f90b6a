"""One interpreter for all tests of Triton kernels: starting it costs seconds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Any]:
    """A pool of processes in which Triton interprets."""
    from tests.kernels.triton_interpreter import interpreter_pool

    with interpreter_pool() as pool:
        yield pool
