"""Attention by definition, for cases whose heads see different keys; and cases drawn from a seed."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any, Protocol

import torch

from tests.budget import assert_within_budget
from tests.tiers import Tier

GROUPS = (1, 1, 2, 2, 3, 4, 4, 5, 7, 8, 16)
"""Query heads of a KV head, as often as they are drawn."""
MAX_SCORES = 250_000
"""Elements of a request's scores, over all heads: keeps thousands of cases within minutes."""
MORE_RUNS = 8
SHOWN = 5
"""Failures of one test that are printed."""


class Case(Protocol):
    """What one numbered draw gives: a frozen dataclass."""

    def __repr__(self) -> str: ...

    def facts(self) -> dict[str, bool]:
        """What of ``tests.tiers.FACTS`` holds for it."""


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Masked softmax attention, every step in the inputs' own precision.

    Args:
        q: [num_rows, num_heads, head_size].
        k: [num_keys, num_kv_heads, head_size]; hidden keys may hold NaN.
        v: Like ``k``.
        mask: Visible keys, bool [num_heads or 1, num_rows, num_keys].
        scale: Softmax scale.

    Returns:
        Like ``q``.
    """
    group = q.shape[1] // k.shape[1]
    k, v = (x.nan_to_num().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    scores = (q.transpose(0, 1) @ k.transpose(1, 2)) * scale
    return (scores.masked_fill(~mask, -math.inf).softmax(-1) @ v).transpose(0, 1)


def one_by_one(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """``attention`` as vector units do it: products added one after the other, exponentials to base 2."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.nan_to_num().transpose(0, 1).repeat_interleave(group, 0) for x in (k, v))
    scores = q.new_zeros(q.shape[1], q.shape[0], k.shape[1])
    for d in range(q.shape[2]):
        scores += q[:, :, d].T[:, :, None] * k[:, None, :, d]
    logits = (scores * (scale * math.log2(math.e))).masked_fill(~mask, -math.inf)
    weights = torch.exp2(logits - logits.amax(-1, keepdim=True))
    out, total = torch.zeros_like(q.transpose(0, 1)), weights.new_zeros(*weights.shape[:2], 1)
    for j in range(k.shape[1]):
        out += weights[:, :, j, None] * v[:, j, None]
        total += weights[:, :, j, None]
    return (out / total).transpose(0, 1)


def compare(
    got: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    *,
    what: str,
) -> None:
    """Asserts that rows are attention under ``mask``, within the error budget; shapes as in ``attention``.

    The largest error of a few fp32 rows is a matter of luck, and of the order of sums: before it fails, plain runs in
    other orders count as well.
    """
    truth = attention(q.double(), k.double(), v.double(), mask, scale)
    plain = attention(q, k, v, mask, scale)
    generator = torch.Generator().manual_seed(0)
    for _ in range(MORE_RUNS if q.dtype == torch.float32 else 0):
        try:
            return assert_within_budget(got, truth, plain, what=what)
        except AssertionError:
            order = torch.randperm(q.shape[2], generator=generator)
            other = one_by_one(q[:, :, order], k[:, :, order], v, mask, scale)
            plain = max(plain, other, key=lambda run: (run.double() - truth).abs().max().item())
    return assert_within_budget(got, truth, plain, what=what)


def dice(family: str, number: int) -> random.Random:
    """The source of one draw: by name and number, so that one case can be drawn again without the others."""
    return random.Random(f"{family} {number}")


def sweep(
    tier: Tier,
    draw: Callable[[int], Case],
    check: Callable[[Any], object],
    numbers: Iterable[int],
) -> None:
    """Checks numbered cases and reports them to the tier; all of them, then fails with the first few that did."""
    failures = []
    for number in numbers:
        case = draw(number)
        try:
            check(case)
        except Exception as error:
            failures.append(f"{type(error).__name__}: {error}\n  {draw.__name__}({number}) is {case}")
        else:
            tier.case(repr(case), **case.facts())
    assert not failures, f"{len(failures)} cases failed:\n" + "\n".join(islice(failures, SHOWN))
