"""Programs at both ends of a launch over a million tokens, interpreted with every 32-bit operation checked."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor

import pytest

pytest.importorskip("triton", reason="the kernels run in Triton's interpreter (Linux)")

from tests.kernels.interpreter import interpreter_pool
from tests.launches import edges
from tests.launches.situations import TOKENS

KERNELS = {
    "triangle": ["triangle_prefill_kernel", "merge_partials_kernel"],
    "sparse": ["sparse_prefill_kernel"],
    "estimate": ["estimate_kernel", "estimate_kernel"],
}


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: the checks stay on in it."""
    with interpreter_pool() as pool:
        yield pool


@pytest.mark.parametrize("kernel", KERNELS)
def test_no_32_bit_operation_overflows(interpreter: ProcessPoolExecutor, kernel: str) -> None:
    launched = interpreter.submit(edges.run, kernel, TOKENS - 3).result()
    assert [name for name, _ in launched] == KERNELS[kernel]


@pytest.mark.parametrize("kernel", ["band", "sparse"])
def test_an_overflow_is_seen(interpreter: ProcessPoolExecutor, kernel: str) -> None:
    """A prompt that ends where 32 bits do: rows and keys beside the last ones lie beyond."""
    assert interpreter.submit(edges.run, kernel, 2**31 - 2).result() == "overflow"
