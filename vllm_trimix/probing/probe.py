"""One probe: what the model can be asked, layers ranked, and sets of them tried on prompts that nothing was chosen by.

Finished work is saved as it comes, so that a stopped probe goes on where it was.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from vllm_trimix.hf_attention import layers as hf_layers
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import choice, ranking, schedule
from vllm_trimix.probing.asking import Asked, Asking
from vllm_trimix.probing.gradient import SECTIONS, SectionScores, mean_scores, score_sample
from vllm_trimix.probing.material import Material
from vllm_trimix.probing.outcome import Outcome, Plan, Settings, Tried
from vllm_trimix.probing.passes import Quality
from vllm_trimix.probing.saved import Saved

Progress = Callable[[str, int, int], None]


def check_layers(model: Any) -> dict[int, str]:
    """Layers that stay stock, with the reason.

    Raises:
        ValueError: The model's attention can't be replaced, or no layer can be a triangle layer.
    """
    hf_layers.check_model(model)
    stock = hf_layers.stock_layers(model)
    if len(stock) == hf_layers.num_layers(model):
        raise ValueError(
            f"{type(model).__name__}: no layer can be sparse: all stay stock ({hf_layers.describe(stock)})"
        )
    return stock


@dataclass(frozen=True)
class _Passes:
    seconds: dict[int, float]
    reuses: bool


class Probe:
    """A probe of one model."""

    def __init__(self, model: Any, settings: Settings, *, saved: Saved, progress: Progress) -> None:
        """Runs nothing yet.

        Args:
            model: A causal language model of transformers, in evaluation mode, on its device.
            settings: What to do.
            saved: Where finished work is kept.
            progress: Told the phase, and how much of it is done.
        """
        self._model, self._settings, self._saved, self._progress = model, settings, saved, progress
        self._stock = check_layers(model)
        self._able = [layer for layer in range(hf_layers.num_layers(model)) if layer not in self._stock]

    def run(
        self, asked: Material, *, budget: float | None, hard: bool, tell: Callable[[str], None] = lambda words: None
    ) -> Outcome:
        """Ranks layers on some prompts and chooses among them on others.

        Args:
            asked: What can be asked.
            budget: Seconds that it may take, told by the first passes; None for no limit.
            hard: Whether a budget that even the fewest prompts exceed is refused.
            tell: Told what is asked, and how long it will take.

        Raises:
            ValueError: More than the time budget, or prompts on which the triangle hides nothing.
        """
        settings, began = self._settings, time.perf_counter()
        shortest = settings.lengths[0]
        with Asking(self._model, settings.pattern, self._saved) as self._asking:
            # What can't fit is refused before all the tasks are asked.
            limit = budget if hard and budget is not None else math.inf
            known = self._asking.find_out(asked, self._progress, lambda seconds: self._refuse(seconds, limit))
            work = self._work()
            self._refuse(work.pass_seconds, limit)
            tell(f"{known.words}; {schedule.expected(work, budget, most=settings.samples)}")
            scored = self._asking.asked("scored", shortest, settings.scored)
        scores = self._gradients(scored) if "gradient" in settings.orders else None
        with self._asking:
            alone = self._alone(scored) if "ablation" in settings.orders else None
            ablation = [[quality.kl for quality in row] for row in alone] if alone else None
            importance = {
                "gradient": [row[SECTIONS.index("middle")] for row in scores[settings.score]] if scores else [],
                "ablation": [statistics.fmean(row) for row in ablation] if ablation else [],
            }
            orders = {name: ranking.rank(importance[name], excluded=self._stock) for name in settings.orders}
            control, curve = self._curves(orders, scored)
            sets = {name: choice.candidates(curve[name]) for name in orders}
            left = None if budget is None else budget - (time.perf_counter() - began)
            plan = self._plan(work, [orders[name][:k] for name in orders for k in sets[name]], left)
            tried: list[Tried] = []
            kept = {name: self._choose(name, orders[name], curve[name], plan.samples, tried) for name in orders}
            first = settings.orders[0]
            k = kept[first] or min(tried[0].losses)
            compared = self._compare(k, min(plan.samples, schedule.COMPARED))
            dense = [self._asking.quality(one, ()) for one in self._asking.asked("held out", shortest, plan.samples)]
        proven = control >= choice.MIN_CONTROL
        return Outcome(
            settings=settings,
            reference=known.reference,
            screened=known.screened,
            plan=plan,
            scores=scores,
            ablation=ablation,
            ablation_losses=self._losses(alone, scored) if alone else None,
            stock=self._stock,
            orders=orders,
            correlations=self._correlations(orders, scores, alone, scored),
            curve=curve,
            control=control,
            tried=tried,
            compared=compared,
            logprobs=[quality.logprob for quality in dense],
            chosen=sorted(orders[first][: kept[first]]) if proven else [],
            kept=kept,
        )

    def _work(self) -> schedule.Work:
        """What there is to do, by the time that passes take; those were timed when they first ran."""
        timed = self._saved.get("passes", self._timed)
        seconds = {int(length): seconds for length, seconds in timed["seconds"].items()}
        return self._work_of(seconds, reuses=timed["reuses"])

    def _work_of(self, seconds: Mapping[int, float], *, reuses: bool) -> schedule.Work:
        settings = self._settings
        return schedule.Work(
            pass_seconds=seconds,
            scored=settings.scored,
            layers=len(self._able),
            gradient="gradient" in settings.orders,
            ablation="ablation" in settings.orders,
            orders=len(settings.orders),
            compared=1 + settings.num_random,
            reuses=reuses,
        )

    def _refuse(self, seconds: Mapping[int, float], limit: float) -> None:
        shortest = min(seconds)
        # A pass takes at least as many times longer as its prompt is.
        at_least = {length: length / shortest * seconds[shortest] for length in self._settings.lengths}
        work = self._work_of({**at_least, **seconds}, reuses=True)
        schedule.refuse(work, limit, most=self._settings.samples)

    def _timed(self) -> _Passes:
        seconds = dict(self._asking.known.pass_seconds)
        for length in self._settings.lengths:
            if length not in seconds:
                [first, *_] = self._asking.asked("held out", length, 1)
                start = time.perf_counter()
                self._asking.quality(first, ())
                seconds[length] = time.perf_counter() - start
        return _Passes(seconds, self._asking.reuses)

    def _plan(self, work: schedule.Work, sets: Sequence[Sequence[int]], left: float | None) -> Plan:
        """How many held-out prompts there is time for, now that the sets are known."""
        layers = len(self._able) + len(self._stock)
        share = statistics.fmean(1 - min(layers_of) / layers for layers_of in sets)
        work = dataclasses.replace(work, share=share)
        most = self._settings.samples
        samples = most if left is None else work.samples_within(left, most=most)
        return Plan(**self._saved.get("plan", lambda: Plan(samples, work.choosing_seconds(samples))))

    def _gradients(self, scored: Sequence[Asked]) -> dict[str, list[list[float]]]:
        settings, found = self._settings, []
        for index, one in enumerate(scored):
            self._progress("gradient", index, len(scored))
            work = partial(score_sample, self._model, one.sample, settings.pattern, objective=settings.objective)
            found.append(self._saved.get(f"{one.name} gradient", work))
        return mean_scores([SectionScores(**item) for item in found])

    def _alone(self, scored: Sequence[Asked]) -> list[list[Quality]]:
        """One layer in triangle at a time: [layer][sample]; stock layers have the dense quality."""
        found: list[list[Quality]] = [[] for _ in range(len(self._able) + len(self._stock))]
        for index, one in enumerate(scored):
            for layer, row in enumerate(found):
                self._progress("ablation", index * len(found) + layer, len(scored) * len(found))
                row.append(self._asking.quality(one, () if layer in self._stock else (layer,)))
        return found

    def _losses(self, rows: Sequence[Sequence[Quality]], scored: Sequence[Asked]) -> list[list[float]]:
        return [[self._asking.loss(one, now) for one, now in zip(scored, row, strict=True)] for row in rows]

    def _correlations(
        self,
        orders: Mapping[str, Sequence[int]],
        scores: Mapping[str, Sequence[Sequence[float]]] | None,
        alone: Sequence[Sequence[Quality]] | None,
        scored: Sequence[Asked],
    ) -> dict[str, float]:
        """How well other orders agree with the measured one: gradient scores, losses, and depth."""
        if alone is None:
            return {}
        middle = SECTIONS.index("middle")
        others = {name: [row[middle] for row in rows] for name, rows in (scores or {}).items()}
        others["loss"] = [statistics.fmean(row) for row in self._losses(alone, scored)]
        found = {name: ranking.rank(values, excluded=self._stock) for name, values in others.items()}
        found["deepest first"] = sorted(self._able, reverse=True)
        values = {name: ranking.rank_correlation(order, orders["ablation"]) for name, order in found.items()}
        return {name: value for name, value in values.items() if value is not None}

    def _curves(
        self, orders: Mapping[str, Sequence[int]], scored: Sequence[Asked]
    ) -> tuple[float, dict[str, dict[int, float]]]:
        """What the prompts that ranked lose: with distant keys hidden from all rows, and with few numbers of layers.

        The first tells whether they need distant keys at all.
        """
        pattern, count = self._settings.pattern, len(self._able)
        streaming = Triangle(pattern.n_init, pattern.n_local, 0)
        control, found = [], {name: {k: list[Quality]() for k in choice.grid(count)} for name in orders}
        for index, one in enumerate(scored):
            self._progress("curve", index, len(scored))
            control.append(self._asking.loss(one, self._asking.quality(one, self._able, pattern=streaming)))
            for name, order in orders.items():
                for k, qualities in found[name].items():
                    qualities.append(self._asking.quality(one, order[:k]))

        def mean(qualities: Sequence[Quality]) -> float:
            losses = [self._asking.loss(one, quality) for one, quality in zip(scored, qualities, strict=True)]
            return max(statistics.fmean(losses), statistics.fmean(quality.kl for quality in qualities))

        curves = {name: {k: mean(qualities) for k, qualities in by_k.items()} for name, by_k in found.items()}
        return statistics.fmean(control), curves

    def _choose(
        self, name: str, order: Sequence[int], curve: Mapping[int, float], samples: int, tried: list[Tried]
    ) -> int:
        """Tries few k on held-out prompts, at each length those that passed before it; the largest that holds."""
        shortest, *longer = self._settings.lengths
        found, sets = Tried(name, shortest), choice.candidates(curve)
        tried.append(found)
        chosen = self._largest(found, order, sets, samples)
        more = choice.further(sets, curve) if chosen == sets[-1] else []
        if more:
            sets += more
            chosen = self._largest(found, order, more, samples) or chosen
        for length in longer:
            sets = [k for k in sets if k <= chosen]
            if not sets:
                break
            found = Tried(name, length)
            tried.append(found)
            # The largest ones; smaller ones only where those fail.
            batches = (sets[-schedule.LONGER_SETS :], sets[: -schedule.LONGER_SETS])
            holding = (self._largest(found, order, batch, samples) for batch in batches if batch)
            chosen = next(filter(None, holding), 0)
        return chosen

    def _largest(self, found: Tried, order: Sequence[int], sets: Sequence[int], samples: int) -> int:
        """Tries these k; the largest that holds."""
        self._try(found, order, sets, samples)
        return choice.choose({k: found.bound(k) for k in sets})

    def _try(self, found: Tried, order: Sequence[int], sets: Sequence[int], samples: int) -> None:
        asked = self._asking.asked("held out", found.length, samples)
        found.correct[0] = statistics.fmean(self._asking.quality(one, ()).correct for one in asked)
        for k in sets:
            found.losses[k], found.kl[k] = [], []
        right = dict.fromkeys(sets, 0)
        for index, one in enumerate(asked):
            for at, k in enumerate(sets):
                what = f"{found.order}, {found.length} tokens"
                self._progress(what, index * len(sets) + at, len(asked) * len(sets))
                quality = self._asking.quality(one, order[:k])
                found.losses[k].append(self._asking.loss(one, quality))
                found.kl[k].append(quality.kl)
                right[k] += quality.correct
        found.correct.update({k: count / len(asked) for k, count in right.items()})

    def _compare(self, k: int, samples: int) -> dict[str, list[float]]:
        """Other orders' first k layers: deepest, and random ones."""
        settings = self._settings
        others = {"deepest": sorted(self._able, reverse=True)}
        for index in range(settings.num_random):
            others[f"random {index + 1}"] = ranking.random_order(self._able, seed=settings.seed, index=index)
        asked = self._asking.asked("held out", settings.lengths[0], samples)
        found: dict[str, list[float]] = {name: [] for name in others}
        for index, one in enumerate(asked):
            for at, (name, order) in enumerate(others.items()):
                self._progress("compared", index * len(others) + at, len(asked) * len(others))
                found[name].append(self._asking.quality(one, order[:k]).kl)
        return found
