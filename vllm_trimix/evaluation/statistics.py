"""Paired differences and their intervals, for few samples and scores that are often all equal."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95
# Probabilities below this are rounding.
_LEAST = 1e-12
_Z = statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2)


class Difference(NamedTuple):
    """A mean difference.

    Attributes:
        mean: Of the pairs.
        low, high: Its 95% interval.
    """

    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """What the interval says; scores are better when higher."""
        if self.low > 0:
            return "gain"
        return "loss" if self.high < 0 else "none seen"


def paired_difference(scores: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The mean difference of paired scores between 0 and 1, with the adjusted Wald interval of Bonett and Price (2012).

    Two pairs are added to those measured, one won and one lost. For right-or-wrong scores this is the published
    interval for paired proportions; for shares of right answers it is a little wider than it need be. Unlike a
    bootstrap it doesn't collapse where all pairs are equal: 20 equal pairs leave a difference of 13 points possible. In
    simulations it holds the truth in 93 to 99 of 100 cases; the least where all that differs is lost.

    Args:
        scores: Of a configuration, [n].
        baseline: Of stock vLLM on the same samples, [n].

    Raises:
        ValueError: Not as many of one as of the other, or none.
    """
    differences = [score - other for score, other in zip(scores, baseline, strict=True)]
    if not differences:
        raise ValueError("scores: none given; a difference needs at least one pair")
    adjusted = [*differences, 1.0, -1.0]
    n = len(adjusted)
    centre = sum(adjusted) / n
    spread = _Z * math.sqrt(max(0.0, sum(value * value for value in adjusted) / n - centre * centre) / n)
    return Difference(statistics.fmean(differences), max(-1.0, centre - spread), min(1.0, centre + spread))


def mean_difference(values: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The mean difference of paired values without bounds, with Student's interval; one pair has an endless one.

    Raises:
        ValueError: Not as many of one as of the other, or none.
    """
    # Heavy, and of the extras.
    from scipy import stats

    differences = [value - other for value, other in zip(values, baseline, strict=True)]
    mean = statistics.fmean(differences)
    if len(differences) < 2:
        return Difference(mean, -math.inf, math.inf)
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(differences) - 1)) * error
    return Difference(mean, mean - reach, mean + reach)


def divergence(dense: Sequence[tuple[int, float]], sparse: Sequence[tuple[int, float]]) -> float:
    """Kullback-Leibler divergence of two token distributions, dense from sparse, in nats, by their likeliest tokens.

    A lower bound of the whole divergence, close to it where the lists hold nearly all the probability: tokens that
    the dense list doesn't name count as one, and those that only it names are taken to be as likely in the other
    distribution as its list allows: each at most as its last, all together at most what it leaves.

    Args:
        dense: Likeliest tokens and their log-probabilities.
        sparse: The same of the other distribution.
    """
    names = {token for token, _ in dense}
    q = dict(sparse)
    pairs = [(math.exp(value), math.exp(q[token])) for token, value in dense if token in q]
    alone = sorted((math.exp(value) for token, value in dense if token not in q), reverse=True)
    rest = max(0.0, 1 - sum(p for p, _ in pairs) - sum(alone))
    free = max(0.0, 1 - sum(other for _, other in pairs))
    cap = math.exp(min(q.values())) if q else 1.0
    least_rest = sum(math.exp(value) for token, value in sparse if token not in names)
    # In proportion to the dense ones is where the divergence is least.
    shares = _shared_out(alone, rest, free, cap)
    if sum(shares) > free - least_rest:
        shares = _shared_out(alone, 0.0, max(0.0, free - least_rest), cap)
    pairs += [*zip(alone, shares, strict=True), (rest, free - sum(shares))]
    return max(0.0, sum(p * math.log(p / max(_LEAST, other)) for p, other in pairs if p > _LEAST))


def _shared_out(weights: Sequence[float], rest: float, amount: float, cap: float) -> list[float]:
    """Shares an amount out by weight, largest first, each share capped; what is left is that of ``rest``."""
    shares, weight = [], rest + sum(weights)
    for own in weights:
        share = min(cap, amount * own / weight) if weight > 0 else 0.0
        shares.append(share)
        amount, weight = amount - share, weight - own
    return shares


def repetition(tokens: Sequence[int], size: int = 4) -> float:
    """Share of the runs of ``size`` tokens that stood in the answer before; 0 where it is shorter."""
    runs = [tuple(tokens[place : place + size]) for place in range(len(tokens) - size + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def shared_prefix(first: Sequence[int], second: Sequence[int]) -> int:
    """Tokens that two answers begin with alike."""
    for place, (one, other) in enumerate(zip(first, second, strict=False)):
        if one != other:
            return place
    return min(len(first), len(second))
