"""Answers by task, length and configuration: scores, paired differences to stock, times."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from vllm_trimix.config.entry import Resolved
from vllm_trimix.evaluation.answers import Answer
from vllm_trimix.evaluation.configurations import STOCK
from vllm_trimix.evaluation.sample import Measure
from vllm_trimix.evaluation.statistics import (
    Difference,
    divergence,
    mean_difference,
    paired_difference,
    repetition,
    shared_prefix,
)
from vllm_trimix.measurement.intervals import median_interval

SOLVED = 0.2
"""Where stock scores less on average, the model can't do the task, and a comparison says little."""


PLACES = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096)
"""Tokens of an answer up to which agreement with stock is counted."""


@dataclass(frozen=True)
class Result:
    """One configuration at one task and length.

    Attributes:
        task, length, configuration, measure: What it is of.
        n: Answered samples that stock answered too.
        failed: Samples without an answer.
        score: Mean; for perplexity the mean negative log-likelihood in nats a token.
        baseline: The same of stock on these samples.
        difference: To stock on the same samples, better when higher (perplexity's sign is turned); None for stock.
        seconds: Median time to the first token, or None.
        ratio: Median ratio of that time to stock's on the same sample, or None.
        ratio_interval: Its 95% interval.
        sparse: Share of the samples on which the configuration's pattern hides something; None where unknown.
        depths: Mean score by depth, where that varies.
        kl_first, kl: Mean divergence from stock of the first answer token, and of all tokens after the same answer so
            far, in nats; for agreement.
        agrees: Share of the answers whose first tokens are stock's, by how many tokens, up to the longest answer; an
            answer that ends before counts as a whole. Where tokens are kept.
        repeated: Mean share of an answer's runs of four tokens that stood in it before, where tokens are kept.
        source: Where the prompts come from.
        comparable: Whether scores may be held against published ones.
    """

    task: str
    length: int
    configuration: str
    measure: str
    n: int
    failed: int
    score: float | None
    baseline: float | None = None
    difference: Difference | None = None
    seconds: float | None = None
    ratio: float | None = None
    ratio_interval: tuple[float, float] | None = None
    sparse: float | None = None
    depths: dict[str, float] = field(default_factory=dict)
    kl_first: float | None = None
    kl: float | None = None
    agrees: dict[str, float] = field(default_factory=dict)
    repeated: float | None = None
    source: str = "own"
    comparable: bool = False

    def as_json(self) -> dict[str, Any]:
        """Plain JSON without what doesn't apply; endless intervals have no numbers there."""
        found = {key: value for key, value in asdict(self).items() if value not in (None, {})}
        if self.difference is not None:
            found["difference"] = {
                key: value if math.isfinite(value) else None for key, value in self.difference._asdict().items()
            }
            found["verdict"] = self.difference.verdict
        return found


def results(answers: Iterable[Answer], resolved: dict[str, Resolved | None]) -> list[Result]:
    """The results of all configurations, by length, task and configuration in the order of ``resolved``.

    Args:
        answers: Of this evaluation.
        resolved: What each configuration ran; None for stock and where that isn't known.
    """
    by_cell: dict[tuple[int, str], dict[str, dict[str, Answer]]] = {}
    for answer in answers:
        if answer.configuration in resolved:
            cell = by_cell.setdefault((answer.length, answer.task), {})
            cell.setdefault(answer.configuration, {})[answer.sample] = answer
    found = []
    for (length, task), cell in sorted(by_cell.items(), key=lambda item: item[0][0]):
        stock = _good(cell.get(STOCK, {}))
        for name, settings in resolved.items():
            if name in cell:
                found.append(_result(task, length, name, cell[name], stock, settings))
    return found


def _good(answers: dict[str, Answer]) -> dict[str, Answer]:
    return {sample: answer for sample, answer in answers.items() if answer.error is None}


def _result(
    task: str,
    length: int,
    name: str,
    answers: dict[str, Answer],
    stock: dict[str, Answer],
    settings: Resolved | None,
) -> Result:
    good = _good(answers)
    any_answer = next(iter(answers.values()))
    # Samples that one of the two didn't answer would make the other's mean another one.
    both = [sample for sample in good if sample in stock]
    pairs = [(good[sample], stock[sample]) for sample in both]
    scores = [score_of(mine, dense) for mine, dense in pairs]
    baseline = [score_of(dense, dense) for _, dense in pairs]
    timed = [(mine.seconds, dense.seconds) for mine, dense in pairs if mine.seconds and dense.seconds]
    times = [answer.seconds for answer in good.values() if answer.seconds]
    ratios = [mine / dense for mine, dense in timed]
    depths: dict[str, list[float]] = {}
    for (mine, _), score in zip(pairs, scores, strict=True):
        if mine.depth is not None:
            depths.setdefault(f"{mine.depth:g}", []).append(score)
    divergences = [_divergences(mine, dense) for mine, dense in pairs if mine.measure == Measure.AGREEMENT]
    other = name != STOCK and bool(pairs)
    return Result(
        task=task,
        length=length,
        configuration=name,
        measure=any_answer.measure,
        n=len(pairs),
        failed=len(answers) - len(good),
        score=statistics.fmean(scores) if scores else None,
        baseline=statistics.fmean(baseline) if baseline else None,
        difference=difference(any_answer.measure, scores, baseline) if other else None,
        seconds=statistics.median(times) if times else None,
        ratio=statistics.median(ratios) if other and ratios else None,
        ratio_interval=median_interval(ratios) if other and ratios else None,
        sparse=None if settings is None else _sparse_share(settings, list(good.values())),
        depths={depth: statistics.fmean(values) for depth, values in sorted(depths.items(), key=_by_number)},
        kl_first=statistics.fmean(first for first, _ in divergences) if other and divergences else None,
        kl=statistics.fmean(every for _, every in divergences) if other and divergences else None,
        agrees=_agrees(pairs) if other else {},
        repeated=statistics.fmean(repetition(mine.tokens) for mine, _ in pairs)
        if pairs and pairs[0][0].tokens
        else None,
        source=any_answer.source,
        comparable=any_answer.comparable,
    )


def _by_number(item: tuple[str, Any]) -> float:
    return float(item[0])


def difference(measure: str, scores: Sequence[float], baseline: Sequence[float]) -> Difference:
    """The paired difference, better when higher."""
    if measure == Measure.PERPLEXITY:
        return mean_difference(baseline, scores)
    return paired_difference(scores, baseline)


def score_of(answer: Answer, dense: Answer) -> float:
    """The answer's score; for agreement the share of the dense answer that it begins with."""
    if answer.measure == Measure.AGREEMENT:
        return shared_prefix(answer.tokens, dense.tokens) / max(1, len(answer.tokens), len(dense.tokens))
    assert answer.score is not None
    return answer.score


def _agrees(pairs: Sequence[tuple[Answer, Answer]]) -> dict[str, float]:
    longest = max(max(len(mine.tokens), len(dense.tokens)) for mine, dense in pairs)
    return {
        str(place): statistics.fmean(mine.tokens[:place] == dense.tokens[:place] for mine, dense in pairs)
        for place in PLACES
        if place <= longest
    }


def divergences(answer: Answer, dense: Answer) -> list[float]:
    """Of each token that follows the same answer so far, in nats."""
    count = min(shared_prefix(answer.tokens, dense.tokens) + 1, len(answer.likeliest), len(dense.likeliest))
    return [divergence(dense.likeliest[place], answer.likeliest[place]) for place in range(count)]


def _divergences(answer: Answer, dense: Answer) -> tuple[float, float]:
    """Of the first token, and the mean."""
    values = divergences(answer, dense)
    return (values[0], statistics.fmean(values)) if values else (0.0, 0.0)


def _sparse_share(settings: Resolved, answers: Sequence[Answer]) -> float:
    """Samples with a row before the last ones for which some layer's pattern hides keys."""

    def is_sparse(answer: Answer) -> bool:
        tokens = answer.prompt_tokens
        triangle = bool(settings.layers) and tokens >= settings.min_prompt_len
        dynamic = settings.shallow is not None and tokens >= settings.shallow.min_seq_len
        return dynamic or (triangle and not settings.triangle.is_dense(tokens))

    return sum(map(is_sparse, answers)) / len(answers) if answers else 0.0


def overall(
    found: Sequence[Result], answers: Iterable[Answer], name: str, length: int
) -> tuple[float, float, Difference] | None:
    """Mean scores over the tasks of a length, stock's and a configuration's, and their difference.

    Tasks count alike; the difference's interval is that of all pairs together. None for fewer than two tasks.
    """
    tasks = {
        r.task for r in found if r.length == length and r.configuration == name and r.measure == Measure.ANSWER and r.n
    }
    if len(tasks) < 2:
        return None
    cells: dict[str, dict[str, Answer]] = {STOCK: {}, name: {}}
    for answer in answers:
        if answer.length == length and answer.task in tasks and answer.configuration in cells and answer.error is None:
            cells[answer.configuration][answer.sample] = answer
    both = [sample for sample in cells[name] if sample in cells[STOCK]]
    scores = [score_of(cells[name][sample], cells[STOCK][sample]) for sample in both]
    baseline = [score_of(cells[STOCK][sample], cells[STOCK][sample]) for sample in both]
    mean = {
        who: statistics.fmean(
            r.score
            for r in found
            if r.configuration == who and r.length == length and r.task in tasks and r.score is not None
        )
        for who in (STOCK, name)
    }
    pooled = paired_difference(scores, baseline)
    return mean[STOCK], mean[name], Difference(mean[name] - mean[STOCK], pooled.low, pooled.high)
