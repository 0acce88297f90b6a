"""Tier C: the Triton kernels, interpreted on the CPU, on cases drawn from a seed; the tables beside it have the edges.

A failure names the case and the call that draws it again.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest

from tests.kernels import sparse_interpreter, test_triton_estimate, triton_interpreter
from tests.kernels.definition import sweep
from tests.kernels.triton_cases import draw_estimate, draw_sparse, draw_triangle
from tests.tiers import Tier

pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")

PARTS = 10

pytestmark = [pytest.mark.tier("C"), pytest.mark.parametrize("part", range(PARTS))]


def _in(pool: ProcessPoolExecutor, run: Callable[[Any], object]) -> Callable[[Any], object]:
    return lambda case: pool.submit(run, case).result()


def test_triangle_kernel(interpreter: ProcessPoolExecutor, tier: Tier, part: int) -> None:
    numbers = range(part, tier.size(sample=50, full=700), PARTS)
    sweep(tier, draw_triangle, _in(interpreter, triton_interpreter.run_case), numbers)


def test_sparse_kernel(interpreter: ProcessPoolExecutor, tier: Tier, part: int) -> None:
    numbers = range(part, tier.size(sample=40, full=550), PARTS)
    sweep(tier, draw_sparse, _in(interpreter, sparse_interpreter.run_case), numbers)


def test_estimate_kernel(interpreter: ProcessPoolExecutor, tier: Tier, part: int) -> None:
    numbers = range(part, tier.size(sample=10, full=150), PARTS)
    sweep(tier, draw_estimate, _in(interpreter, test_triton_estimate.run_case), numbers)
