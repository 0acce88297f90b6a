"""What tables and pictures of the evaluation share: figures of kept answers, and how they are written."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.real_models.pinned import MODELS as PINNED
from benchmarks.real_models.plan import CLAIMED, Model
from benchmarks.real_models.results import Kept
from vllm_trimix.evaluation.statistics import Difference, mean_difference

Found = Mapping[str, Kept]
NOTHING = "Not measured yet."


def title(model: Model) -> str:
    """As tables name it."""
    return next(pinned.title for pinned in PINNED if pinned.folder == model.folder)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; ``NOTHING`` without rows."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([f"| {' | '.join(columns)} |", "|---" * len(columns) + "|", *lines]) if lines else NOTHING


def divergence(kept: Kept, length: int, configuration: str) -> Difference | None:
    """Mean divergence of a prompt from stock, in nats a token, with Student's interval; None where it wasn't asked."""
    means = [
        statistics.fmean(line["kl"])
        for line in kept.answers
        if line["configuration"] == configuration and line["length"] == length and line.get("kl")
    ]
    return mean_difference(means, [0.0] * len(means)) if means else None


def difference(cell: Mapping[str, Any]) -> Difference:
    """A result's difference to stock."""
    found = cell["difference"]
    return Difference(found["mean"], found["low"], found["high"])


def points(score: float) -> str:
    """A share as points."""
    return f"{100 * score:.0f}"


def interval(by: Difference) -> str:
    """A difference of shares, as points with its interval."""
    return f"{100 * by.mean:+.1f} ({100 * by.low:+.1f} to {100 * by.high:+.1f})"


def nats(by: Difference | None) -> str:
    """A divergence with its interval."""
    if by is None:
        return ""
    return f"{by.mean:.2g}" + (f" ({max(0.0, by.low):.2g} to {by.high:.2g})" if abs(by.low) < float("inf") else "")


def task_cell(cell: Mapping[str, Any] | None) -> str:
    """Scores of stock and of a configuration with their difference, bold where its interval excludes 0."""
    if cell is None:
        return ""
    few = "" if cell["n"] >= CLAIMED else f", n={cell['n']}"
    by = difference(cell)
    mark = "**" if by.verdict != "none seen" else ""
    return f"{points(cell['baseline'])} to {points(cell['score'])}: {mark}{interval(by)}{mark}{few}"
