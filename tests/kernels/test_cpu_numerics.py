"""Tier B: the CPU kernels against fp64 masked softmax, on thousands of cases drawn from a seed.

A failure names the call that runs its case once more; every case can be drawn without the others.
"""

from __future__ import annotations

import pytest

from tests.kernels.cpu_cases import draw_dynamic_step, draw_triangle_step
from tests.kernels.cpu_steps import check_dynamic_step, check_triangle_step
from tests.kernels.definition import sweep
from tests.kernels.selected import check_selected, draw_selected
from tests.tiers import Tier

PARTS = 10

pytestmark = [pytest.mark.tier("B"), pytest.mark.parametrize("part", range(PARTS))]


def test_steps_of_triangle_layers(tier: Tier, part: int) -> None:
    """The plan, the triangle kernel and vLLM's operator for the rest, against the rule."""
    sweep(tier, draw_triangle_step, check_triangle_step, range(part, tier.size(sample=300, full=11_000), PARTS))


def test_steps_of_dynamic_layers(tier: Tier, part: int) -> None:
    """The plan, patterns for each head, the sparse kernels and vLLM's operator for the rest, against the choice."""
    sweep(tier, draw_dynamic_step, check_dynamic_step, range(part, tier.size(sample=120, full=5_000), PARTS))


def test_random_selections(tier: Tier, part: int) -> None:
    """The sparse kernels alone, every instruction set, on what no pattern would choose."""
    sweep(tier, draw_selected, check_selected, range(part, tier.size(sample=180, full=6_000), PARTS))
