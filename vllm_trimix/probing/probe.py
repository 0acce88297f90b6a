"""One probe: what the model can be asked, layers ranked, and sets of them tried on prompts that nothing was chosen by.

Finished work is saved as it comes, so that a stopped probe goes on where it was.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from vllm_trimix.hf_attention import layers as hf_layers
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import choice, material, ranking, schedule
from vllm_trimix.probing.gradient import SECTIONS, Sample, SectionScores, mean_scores, score_sample
from vllm_trimix.probing.material import Material
from vllm_trimix.probing.outcome import Outcome, Plan, Settings, Tried
from vllm_trimix.probing.passes import Quality, TriangleModel, own_answer
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


class _Asked(NamedTuple):
    name: str
    """Among the saved results."""
    sample: Sample


@dataclass(frozen=True)
class _Answer:
    tokens: tuple[int, ...]


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
        settings = self._settings
        shortest = settings.lengths[0]
        with TriangleModel(self._model, settings.pattern) as self._triangle:
            self._known = known = material.find_out(asked, is_right=self._is_right, progress=self._progress)
            plan = self._plan(budget, hard)
            tell(f"{known.words}; about {schedule.words(plan.seconds)}")
            scored = self._asked("scored", shortest, settings.scored)
        scores = self._gradients(scored) if "gradient" in settings.orders else None
        with TriangleModel(self._model, settings.pattern) as self._triangle:
            alone = self._alone(scored) if "ablation" in settings.orders else None
            ablation = [[quality.kl for quality in row] for row in alone] if alone else None
            importance = {
                "gradient": [row[SECTIONS.index("middle")] for row in scores[settings.score]] if scores else [],
                "ablation": [statistics.fmean(row) for row in ablation] if ablation else [],
            }
            orders = {name: ranking.rank(importance[name], excluded=self._stock) for name in settings.orders}
            control, curve = self._curves(orders, scored)
            tried: list[Tried] = []
            kept = {name: self._choose(name, order, curve[name], plan.samples, tried) for name, order in orders.items()}
            first = settings.orders[0]
            k = kept[first] or min(tried[0].losses)
            compared = self._compare(k, min(plan.samples, schedule.COMPARED))
            dense = [self._quality(one, ()) for one in self._asked("held out", shortest, plan.samples)]
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

    def _is_right(self, name: str, sample: Sample) -> bool:
        return self._quality(_Asked(name, sample), ()).correct

    def _quality(self, one: _Asked, layers: Iterable[int], *, pattern: Triangle | None = None) -> Quality:
        """A set's quality, computed once. All sets of a sample are best asked one after the other."""
        chosen = sorted(layers)
        key = f"{one.name} under {'streaming ' if pattern else ''}{','.join(map(str, chosen))}"
        return Quality(**self._saved.get(key, partial(self._triangle.quality, one.sample, chosen, pattern=pattern)))

    def _loss(self, one: _Asked, now: Quality) -> float:
        """Nats that an answer loses: of its log-probability where it is known to be right, else its divergence."""
        return now.kl if self._known.reference == "own" else self._quality(one, ()).logprob - now.logprob

    def _asked(self, what: str, length: int, count: int) -> list[_Asked]:
        """Prompts with what they are held against."""
        found = []
        for index, sample in enumerate(self._known.material.draw(what, length, count)):
            name = f"{what} {length} {index}"
            if self._known.reference == "own":
                say = partial(self._say, sample.prompt)
                sample = Sample(sample.prompt, tuple(self._saved.get(f"{name} answer", say)["tokens"]))
            found.append(_Asked(name, sample))
        return found

    def _say(self, prompt: tuple[int, ...]) -> _Answer:
        return _Answer(own_answer(self._model, prompt, tokens=material.OWN_TOKENS))

    def _plan(self, budget: float | None, hard: bool) -> Plan:
        """How many held-out prompts, by the time that a pass takes."""
        return Plan(**self._saved.get("plan", partial(self._planned, budget, hard)))

    def _planned(self, budget: float | None, hard: bool) -> Plan:
        settings, known = self._settings, self._known
        seconds = dict(known.pass_seconds)
        for length in settings.lengths:
            if length not in seconds:
                [first, *_] = self._asked("held out", length, 1)
                start = time.perf_counter()
                self._quality(first, ())
                seconds[length] = time.perf_counter() - start
        work = schedule.Work(
            pass_seconds=seconds,
            scored=settings.scored,
            layers=len(self._able),
            gradient="gradient" in settings.orders,
            ablation="ablation" in settings.orders,
            orders=len(settings.orders),
            compared=1 + settings.num_random,
            reuses=self._triangle.reuses,
        )
        samples = settings.samples
        if budget is not None:
            samples = work.samples_within(budget, most=settings.samples)
            if hard and work.seconds(samples) > budget:
                raise ValueError(
                    f"--time-budget: {budget / 60:g} minutes: even {samples} held-out prompts of each length take "
                    f"about {schedule.words(work.seconds(samples))}; allow as much, or take shorter --lengths"
                )
        return Plan(samples, work.seconds(samples))

    def _gradients(self, scored: Sequence[_Asked]) -> dict[str, list[list[float]]]:
        settings, found = self._settings, []
        for index, one in enumerate(scored):
            self._progress("gradient", index, len(scored))
            work = partial(score_sample, self._model, one.sample, settings.pattern, objective=settings.objective)
            found.append(self._saved.get(f"{one.name} gradient", work))
        return mean_scores([SectionScores(**item) for item in found])

    def _alone(self, scored: Sequence[_Asked]) -> list[list[Quality]]:
        """One layer in triangle at a time: [layer][sample]; stock layers have the dense quality."""
        found: list[list[Quality]] = [[] for _ in range(len(self._able) + len(self._stock))]
        for index, one in enumerate(scored):
            for layer, row in enumerate(found):
                self._progress("ablation", index * len(found) + layer, len(scored) * len(found))
                row.append(self._quality(one, () if layer in self._stock else (layer,)))
        return found

    def _losses(self, rows: Sequence[Sequence[Quality]], scored: Sequence[_Asked]) -> list[list[float]]:
        return [[self._loss(one, now) for one, now in zip(scored, row, strict=True)] for row in rows]

    def _correlations(
        self,
        orders: Mapping[str, Sequence[int]],
        scores: Mapping[str, Sequence[Sequence[float]]] | None,
        alone: Sequence[Sequence[Quality]] | None,
        scored: Sequence[_Asked],
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
        self, orders: Mapping[str, Sequence[int]], scored: Sequence[_Asked]
    ) -> tuple[float, dict[str, dict[int, float]]]:
        """What the prompts that ranked lose: with distant keys hidden from all rows, and with few numbers of layers.

        The first tells whether they need distant keys at all.
        """
        pattern, count = self._settings.pattern, len(self._able)
        streaming = Triangle(pattern.n_init, pattern.n_local, 0)
        control, found = [], {name: {k: list[Quality]() for k in choice.grid(count)} for name in orders}
        for index, one in enumerate(scored):
            self._progress("curve", index, len(scored))
            control.append(self._loss(one, self._quality(one, self._able, pattern=streaming)))
            for name, order in orders.items():
                for k, qualities in found[name].items():
                    qualities.append(self._quality(one, order[:k]))

        def mean(qualities: Sequence[Quality]) -> float:
            losses = [self._loss(one, quality) for one, quality in zip(scored, qualities, strict=True)]
            return max(statistics.fmean(losses), statistics.fmean(quality.kl for quality in qualities))

        curves = {name: {k: mean(qualities) for k, qualities in by_k.items()} for name, by_k in found.items()}
        return statistics.fmean(control), curves

    def _choose(
        self, name: str, order: Sequence[int], curve: dict[int, float], samples: int, tried: list[Tried]
    ) -> int:
        """Tries few k on held-out prompts, at each length those that passed before it; the largest that holds."""
        open_sets, chosen = choice.candidates(curve), 0
        for length in self._settings.lengths:
            batches = [open_sets]
            if length != self._settings.lengths[0]:
                # The largest ones; smaller ones only where those fail.
                batches = [open_sets[-schedule.LONGER_SETS :], open_sets[: -schedule.LONGER_SETS]]
            found = Tried(name, length)
            tried.append(found)
            chosen = 0
            for batch in filter(None, batches):
                self._try(found, order, batch, samples)
                chosen = choice.choose({k: found.bound(k) for k in batch})
                if chosen:
                    break
            open_sets = [k for k in open_sets if k <= chosen]
            if not chosen:
                break
        return chosen

    def _try(self, found: Tried, order: Sequence[int], sets: Sequence[int], samples: int) -> None:
        asked = self._asked("held out", found.length, samples)
        found.correct[0] = statistics.fmean(self._quality(one, ()).correct for one in asked)
        for k in sets:
            found.losses[k], found.kl[k] = [], []
        right = dict.fromkeys(sets, 0)
        for index, one in enumerate(asked):
            for at, k in enumerate(sets):
                what = f"{found.order}, {found.length} tokens"
                self._progress(what, index * len(sets) + at, len(asked) * len(sets))
                quality = self._quality(one, order[:k])
                found.losses[k].append(self._loss(one, quality))
                found.kl[k].append(quality.kl)
                right[k] += quality.correct
        found.correct.update({k: count / len(asked) for k, count in right.items()})

    def _compare(self, k: int, samples: int) -> dict[str, list[float]]:
        """Other orders' first k layers: deepest, and random ones."""
        settings = self._settings
        others = {"deepest": sorted(self._able, reverse=True)}
        for index in range(settings.num_random):
            others[f"random {index + 1}"] = ranking.random_order(self._able, seed=settings.seed, index=index)
        asked = self._asked("held out", settings.lengths[0], samples)
        found: dict[str, list[float]] = {name: [] for name in others}
        for index, one in enumerate(asked):
            for at, (name, order) in enumerate(others.items()):
                self._progress("compared", index * len(others) + at, len(asked) * len(others))
                found[name].append(self._quality(one, order[:k]).kl)
        return found
