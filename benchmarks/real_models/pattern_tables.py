"""The tables of dynamic patterns: what each reads, takes and loses, and which to take at which length."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.real_models.pattern_results import NAME
from benchmarks.real_models.patterns import DENSITY, LENGTHS, TOGETHER, TTFT
from benchmarks.real_models.plan import MODELS, K, Model
from benchmarks.real_models.written import (
    NOTHING,
    Found,
    difference,
    divergence,
    nats,
    points,
    table,
    task_cell,
    title,
)
from vllm_trimix.config.layers import format_layers
from vllm_trimix.evaluation.configurations import NOISE_FLOOR, STOCK, TRIMIX
from vllm_trimix.evaluation.statistics import Difference
from vllm_trimix.probing.choice import MAX_LOSS

_NONE = "none"


@dataclass(frozen=True)
class Measured:
    """What is known of a configuration at a length.

    Attributes:
        name: Of the configuration.
        layers: Layers of its dynamic pattern; empty for the triangle alone.
        keys: Share of dense attention's keys that these layers read on average.
        time: Median of its time to the first token over stock's, and the 95% interval.
        kl: Divergence from stock.
        same: Share of continuations that are stock's for 64 tokens.
        tasks: Results by task.
    """

    name: str
    layers: tuple[int, ...] = ()
    keys: float | None = None
    time: tuple[float, float, float] | None = None
    kl: Difference | None = None
    same: float | None = None
    tasks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """As tables name it."""
        return "triangle" if self.name == TRIMIX else self.name.replace(TOGETHER, "triangle + ")

    @property
    def is_sound(self) -> bool:
        """Whether its divergence is known and small, and no task's interval excludes that nothing is lost."""
        lost = any(difference(cell).verdict == "loss" for cell in self.tasks.values())
        return self.kl is not None and self.kl.mean <= MAX_LOSS and not lost


def measured(found: Found, model: Model, length: int) -> list[Measured]:
    """Every configuration of a model and length, the triangle first; empty where nothing is known."""
    folder = f"{model.short}-{NAME}-{{}}-{length // K}k"
    documents = found.get(folder.format("documents"))
    needles = found.get(folder.format("niah"))
    answered = [kept for kept in (documents, needles) if kept is not None]
    ran = {name: facts for kept in answered for name, facts in kept.result["configurations"].items()}
    times = _times(found, model, length)
    rows = []
    for name in dict.fromkeys([*ran, *times]):
        if name in (STOCK, NOISE_FLOOR):
            continue
        shallow = ((ran.get(name) or {}).get("resolved") or {}).get("shallow") or {}
        layers = tuple(shallow.get("layers", ()))
        cell = next(iter(documents.of(name)), None) if documents is not None else None
        cells = {cell["task"]: cell for cell in needles.of(name) if cell["n"]} if needles is not None else {}
        rows.append(
            Measured(
                name,
                layers,
                keys=_keys(found, model, length, name.removeprefix(TOGETHER), layers),
                time=times.get(name),
                kl=divergence(documents, length, name) if documents is not None else None,
                same=cell["agrees"].get("64") if cell is not None else None,
                tasks=cells,
            )
        )
    return rows


def _keys(found: Found, model: Model, length: int, name: str, layers: Sequence[int]) -> float | None:
    for entry in found[NAME].result[DENSITY] if NAME in found else ():
        if (entry["model"], entry["length"]) == (model.folder, length):
            shares = [entry["layers"].get(str(layer), {}).get(name, {}).get("density") for layer in layers]
            known = [share for share in shares if share is not None]
            return statistics.fmean(known) if known else None
    return None


def _times(found: Found, model: Model, length: int) -> dict[str, tuple[float, float, float]]:
    times: dict[str, tuple[float, float, float]] = {}
    for entry in found[NAME].result[TTFT] if NAME in found else ():
        if (entry["model"], entry["length"]) == (model.folder, length):
            for row in entry["rows"]:
                # The triangle was timed beside each few patterns; any of them will do.
                times.setdefault(row["config"], (row["ratio_to_stock"], *row["ratio_ci95"]))
    return times


def compared(found: Found) -> str:
    """A table a model and length, a row a configuration."""
    parts = []
    for model in MODELS:
        for length in LENGTHS[model.short]:
            rows = measured(found, model, length)
            if rows:
                documents = found.get(f"{model.short}-{NAME}-documents-{length // K}k")
                floor = None if documents is None else divergence(documents, length, NOISE_FLOOR)
                noise = "" if floor is None else f"; noise floor {nats(floor)}"
                parts.append(f"**{title(model)}** at {length} tokens{noise}:\n\n{_table(rows)}")
    return "\n\n".join(parts) or NOTHING


def _table(rows: Sequence[Measured]) -> str:
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    columns = ("configuration", "pattern's layers", "keys read (%)", "time (95%)", "KL (95%)", "same 64 (%)", *tasks)
    return table(
        columns,
        (
            (
                row.title,
                format_layers(row.layers) if row.layers else "",
                "" if row.keys is None else points(row.keys),
                _time(row),
                nats(row.kl),
                "" if row.same is None else points(row.same),
                *(task_cell(row.tasks.get(task)) for task in tasks),
            )
            for row in rows
        ),
    )


def _time(row: Measured) -> str:
    if row.time is None:
        return ""
    middle, low, high = row.time
    return f"{middle:.2f} ({low:.2f} to {high:.2f})"


def choice(found: Found) -> str:
    """Which configuration to take at each length that was timed."""
    rows = []
    for model in MODELS:
        for length in LENGTHS[model.short]:
            there = measured(found, model, length)
            if any(row.time for row in there):
                best = fastest(there)
                keys = "" if best is None or best.keys is None else points(best.keys)
                more = (_NONE, "", "", "") if best is None else (best.title, keys, _time(best), nats(best.kl))
                rows.append((title(model), str(length), *more))
    return table(("model", "tokens", "take", "keys read (%)", "time (95%)", "KL (95%)"), rows)


def fastest(rows: Sequence[Measured]) -> Measured | None:
    """The fastest configuration that is sound; None where stock is no slower.

    A pattern beats the triangle alone only where its interval lies below the triangle's median.
    """
    base = next((row for row in rows if row.name == TRIMIX and row.time is not None and row.is_sound), None)
    limit = 1.0
    if base is not None and base.time is not None:
        limit = min(limit, base.time[0])
        base = base if base.time[2] < 1 else None
    # Without tasks little is known of losses.
    faster = [row for row in rows if row.name != TRIMIX and row.time and row.time[2] < limit]
    sound = [row for row in faster if row.tasks and row.is_sound]
    return min(sound, key=lambda row: row.time or (limit,), default=base)
