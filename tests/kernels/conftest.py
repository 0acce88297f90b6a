"""One interpreter for all tests of Triton kernels, because starting it costs seconds; one thread for small shapes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch


@pytest.fixture(scope="session")
def interpreter() -> Iterator[Any]:
    """A pool of processes in which Triton interprets."""
    from tests.kernels.interpreter import interpreter_pool

    with interpreter_pool() as pool:
        yield pool


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """More threads would mostly wait for each other, on a busy machine for longer than the products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
