"""The truth on sampled rows, and how far a kernel may be from it: without that no time is worth printing."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from benchmarks.kernels.problem import FP8, Problem
from vllm_trimix.kernels.reference import masked_attention
from vllm_trimix.patterns.triangle import Triangle

NUM_ROWS = 48


class Mask(Protocol):
    """What makes a row's truth, hashable; ``vllm_trimix.patterns.triangle.Triangle`` is one."""

    def mask(self, q_positions: torch.Tensor, k_positions: torch.Tensor, prompt_len: int) -> torch.Tensor:
        """Visibility of keys, as ``Triangle.mask``."""


def sample_rows(
    length: int, chunks: Sequence[tuple[int, int]], pattern: Triangle, *, count: int = NUM_ROWS
) -> list[int]:
    """Rows where kernels go wrong, filled up with random ones; sorted.

    The first rows, those around the window's and the sinks' ends, around the first dense row, the last row, and around
    chunk borders (of many, evenly spread ones).
    """
    wanted = [0, 1, length - 1]
    for edge in (pattern.n_init, pattern.n_local, pattern.n_init + pattern.n_local, length - pattern.last_n):
        wanted += [edge - 1, edge, edge + 1]
    borders = [start for start, _ in chunks[1:]]
    for border in borders[:: -(-len(borders) // 8) or 1][:8]:
        wanted += [border - 1, border]
    rows = list(dict.fromkeys(row for row in wanted if 0 <= row < length))[:count]
    rest = sorted(set(range(length)) - set(rows))
    return sorted(rows + random.Random(0).sample(rest, min(len(rest), count - len(rows))))


@dataclass(frozen=True)
class Error:
    """Distance from the truth.

    Attributes:
        largest: Largest absolute error.
        rms: Root of the mean squared error of the worst row, relative to that row's truth: early rows average few
            values and are large, so an error over all rows would hide a late row that misses keys.
    """

    largest: float
    rms: float


@dataclass(frozen=True)
class Reference:
    """The truth on some rows under one pattern.

    Attributes:
        rows: Positions.
        truth: fp64 attention of the low-precision inputs, [rows, num_heads, head_size].
        budget: Twice the error of plain PyTorch in the kernel's precision, plus one rounding of the output.
    """

    rows: list[int]
    truth: torch.Tensor
    budget: Error

    def error(self, outputs: Sequence[torch.Tensor]) -> Error:
        """Error of a prefill's outputs, one tensor a step, in order; infinite if a value isn't finite."""
        found, first, wanted = [], 0, torch.tensor(self.rows)
        for output in outputs:
            inside = wanted[(wanted >= first) & (wanted < first + len(output))] - first
            found.append(output[inside.to(output.device)])
            first += len(output)
        return _error(torch.cat(found), self.truth)

    def fault(self, error: Error) -> str | None:
        """Why no time may be printed, or None."""
        for what, value, limit in (
            ("max error", error.largest, self.budget.largest),
            ("RMS error of the worst row", error.rms, self.budget.rms),
        ):
            if not value <= limit:
                return f"{what} {value:.3g} exceeds the budget {limit:.3g}"
        return None


def make_reference(problem: Problem, pattern: Mask, *, fp8_products: bool = False) -> Reference:
    """The truth and the budget, a KV head at a time: memory grows with the sampled rows times the prompt.

    Args:
        problem: The inputs.
        pattern: The definition of what each row sees.
        fp8_products: Whether the budget is that of kernels that multiply in fp8, probabilities included.
    """
    settings = problem.settings
    rows = sample_rows(problem.length, problem.chunks, settings.pattern)
    index = torch.tensor(rows, device=problem.q.device)
    mask = pattern.mask(index, torch.arange(problem.length, device=index.device), problem.length)
    group = settings.num_heads // settings.num_kv_heads
    plain_attention = _fp8_attention if fp8_products else masked_attention
    truth, plain = [], []
    for head in range(settings.num_kv_heads):
        q = problem.q[index, head * group : (head + 1) * group]
        k, v = (x[:, head : head + 1] for x in (problem.k, problem.v))
        truth.append(masked_attention(q.double(), k.double(), v.double(), mask, scale=settings.scale))
        plain.append(plain_attention(q, k, v, mask, scale=settings.scale))
    exact = torch.cat(truth, dim=1)
    plain_error = _error(torch.cat(plain, dim=1), exact)
    eps = torch.finfo(settings.dtype).eps
    budget = Error(
        largest=2 * plain_error.largest + eps * exact.abs().max().item(),
        # About the RMS of rounding to nearest.
        rms=2 * plain_error.rms + eps / 4,
    )
    return Reference(rows, exact, budget)


def _fp8_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, *, scale: float
) -> torch.Tensor:
    """One KV head with exact scores and unnormalised probabilities rounded to fp8, as fp8 kernels multiply them."""
    scores = torch.einsum("qhd,kd->hqk", q.float(), k[:, 0].float()) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    probs = torch.exp(scores - scores.amax(-1, keepdim=True))
    product = torch.einsum("hqk,kd->qhd", probs.to(FP8).float(), v[:, 0].float())
    return (product / probs.sum(-1).T[..., None]).to(q.dtype)


def _error(got: torch.Tensor, truth: torch.Tensor) -> Error:
    difference = got.double() - truth
    if not torch.isfinite(difference).all():
        return Error(float("inf"), float("inf"))
    rms = difference.square().mean((1, 2)).sqrt() / truth.square().mean((1, 2)).sqrt()
    return Error(difference.abs().max().item(), rms.max().item())
