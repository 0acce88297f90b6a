"""The layer choice: where to look for it, and the largest k that surely loses next to nothing."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

CONFIDENCE = 0.95
MAX_LOSS = 0.01
"""Nats that an answer may lose on average: of its log-probability, and as divergence from the dense answer."""
MIN_CONTROL = 10 * MAX_LOSS
"""What an answer must lose when distant keys are hidden from all rows: where nobody needs them, nothing is proven."""

_GRID = (0.2, 0.4, 0.6, 0.8, 1.0)


def upper_bound(losses: Sequence[float]) -> float:
    """Upper end of the one-sided 95% interval of the mean, by Student's t; infinite for a single value."""
    if len(losses) < 2:
        return math.inf
    return statistics.fmean(losses) + _quantile(len(losses)) * statistics.stdev(losses) / len(losses) ** 0.5


def prompts_needed(losses: Sequence[float]) -> int | None:
    """About how many prompts would bring the bound to the limit, were mean and spread to stay; None: no number."""
    room = MAX_LOSS - statistics.fmean(losses)
    if room <= 0 or len(losses) < 2:
        return None
    return math.ceil((_quantile(len(losses)) * statistics.stdev(losses) / room) ** 2)


def _quantile(count: int) -> float:
    # Heavy, and of the extras.
    from scipy import stats

    return float(stats.t.ppf(CONFIDENCE, count - 1))


def grid(count: int) -> list[int]:
    """Few values of k, ascending, that show where losses begin to grow.

    Args:
        count: Of layers that can be chosen.
    """
    return sorted({max(1, round(share * count)) for share in _GRID})


def candidates(curve: Mapping[int, float]) -> list[int]:
    """Few values of k where the curve turns, ascending: what is tried on prompts that nothing was chosen by.

    Args:
        curve: k -> mean loss on other prompts, of ``grid``'s k.
    """
    turn = 0
    for k in sorted(curve):
        if curve[k] > MAX_LOSS:
            break
        turn = k
    beyond = min((k for k in curve if k > turn), default=turn)
    step = (beyond - turn) / 3
    lower = {round(turn / 2), round(0.75 * turn), turn} if turn else {round(2 * step)}
    return sorted({*lower, round(turn + step)} - {0}) or [1]


def further(tried: Iterable[int], curve: Mapping[int, float]) -> list[int]:
    """Few larger values of k, ascending, for where all that were tried hold; empty where there are none.

    Args:
        tried: Those of ``candidates``.
        curve: As there.
    """
    last = max(tried)
    beyond = min((k for k in curve if k > last), default=last)
    return sorted({(last + beyond + 1) // 2, beyond} - {last})


def choose(bounds: Mapping[int, float], *, max_loss: float = MAX_LOSS) -> int:
    """The largest k that is surely within the limit, and all tried before it too.

    Tried in ascending order up to the first that fails, each at 95%, the choice as a whole holds at 95% (a fixed
    sequence of tests); the best of many k would not.

    Args:
        bounds: k -> upper bound of what held-out answers lose on average, in nats.
        max_loss: What it may be.
    """
    chosen = 0
    for k in sorted(bounds):
        if bounds[k] > max_loss:
            break
        chosen = k
    return chosen
