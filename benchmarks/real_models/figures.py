"""The pictures of docs/is-it-lossless.md, each drawn where there is data for it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.real_models.ablation_tables import counts, varied
from benchmarks.real_models.plan import MODELS, SMOLLM2, K
from benchmarks.real_models.results import Kept
from benchmarks.real_models.tables import solved
from benchmarks.real_models.written import Found, difference, divergence, title
from vllm_trimix.evaluation.configurations import NOISE_FLOOR, STOCK, TRIMIX
from vllm_trimix.evaluation.statistics import shared_prefix

# Told apart without colour vision; markers differ too.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
_MARKERS = ("o", "s", "^", "D")
_LEAST = 1e-10


def draw(folder: Path, found: Found) -> dict[str, str]:
    """Draws what there is data for; returns the files' names by part of the page."""
    drawn = {}
    for part, name, picture in PICTURES:
        figure = picture(found)
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            figure.savefig(folder / name, dpi=100)
            drawn[part] = name
    return drawn


def _figure(width: float, height: float, columns: int, *, sharey: bool = False) -> tuple[Any, list[Any]]:
    # Of the extra `plot`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, list(figure.subplots(1, columns, squeeze=False, sharey=sharey)[0])


def _tasks(found: Found) -> Any:
    """A panel a model, a row a task; a point a length with its interval."""
    shown = [(model, cells) for model in MODELS if (cells := solved(found, model))]
    if not shown:
        return None
    most = max(len({cell["task"] for cell in cells}) for _, cells in shown)
    figure, panels = _figure(5.0 * len(shown), 1.2 + 0.42 * most, len(shown))
    for panel, (model, cells) in zip(panels, shown, strict=True):
        tasks = list(dict.fromkeys(cell["task"] for cell in cells))
        lengths = sorted({cell["length"] for cell in cells})
        for number, length in enumerate(lengths):
            there = [cell for cell in cells if cell["length"] == length]
            places = [tasks.index(cell["task"]) + 0.18 * (number - (len(lengths) - 1) / 2) for cell in there]
            by = [difference(cell) for cell in there]
            style = {"color": _COLOURS[number % 4], "marker": _MARKERS[number % 4]}
            panel.scatter([100 * d.mean for d in by], places, s=22, label=f"{length} tokens", **style)
            panel.hlines(places, [100 * d.low for d in by], [100 * d.high for d in by], color=style["color"], lw=1.2)
        panel.axvline(0, color="black", linewidth=0.8)
        panel.set_yticks(range(len(tasks)), tasks, fontsize="small")
        panel.invert_yaxis()
        panel.set_xlabel("difference to stock (points, 95%)")
        panel.set_title(title(model), fontsize="medium")
        panel.legend(frameon=False, fontsize="x-small", loc="best")
    return figure


def _needle(found: Found) -> Any:
    """A panel a model: depth down, length across; stock's score and the triangle's, their difference as colour."""
    shown = [(model, kept) for model in MODELS if (kept := found.get(f"{model.short}-niah")) is not None]
    shown = [(model, kept) for model, kept in shown if any(cell["n"] for cell in kept.of(TRIMIX))]
    if not shown:
        return None
    columns = [sorted({cell["length"] for cell in kept.of(TRIMIX)}) for _, kept in shown]
    figure, panels = _figure(1.6 + sum(1.6 + 1.0 * len(lengths) for lengths in columns), 4.2, len(shown))
    picture = None
    for panel, (model, kept), lengths in zip(panels, shown, columns, strict=True):
        scores = {
            name: {(depth, cell["length"]): score for cell in kept.of(name) for depth, score in cell["depths"].items()}
            for name in (STOCK, TRIMIX)
        }
        depths = sorted({depth for depth, _ in scores[TRIMIX]}, key=float)
        grid = [[math.nan] * len(lengths) for _ in depths]
        for (depth, length), score in scores[TRIMIX].items():
            row, column, dense = depths.index(depth), lengths.index(length), scores[STOCK].get((depth, length))
            if dense is not None:
                grid[row][column] = score - dense
                panel.text(column, row, f"{100 * dense:.0f}, {100 * score:.0f}", ha="center", va="center", fontsize=7)
        # Orange and purple are told apart without red and green.
        picture = panel.imshow(grid, vmin=-1, vmax=1, cmap="PuOr", aspect="auto")
        panel.set_xticks(range(len(lengths)), [f"{length // K}K" for length in lengths], fontsize="small")
        panel.set_yticks(range(len(depths)), [f"{100 * float(depth):.0f}%" for depth in depths], fontsize="small")
        panel.set_title(title(model), fontsize="medium")
        panel.set_xlabel("tokens")
    panels[0].set_ylabel("depth of the needle")
    figure.colorbar(picture, ax=panels, label="TRIMIX less stock", shrink=0.9)
    return figure


def _layers(found: Found) -> Any:
    """Divergence against the number of layers: ranked ones, and a point a random set."""
    kept = found.get(f"{SMOLLM2.short}-layers")
    if kept is None or not any(ranked for ranked, _ in counts(kept).values()):
        return None
    figure, [panel] = _figure(5.6, 3.4, 1)
    by_count = counts(kept)
    ranked = [(count, by.mean) for count, (by, _) in by_count.items() if by is not None]
    drawn = [(count, value) for count, (_, values) in by_count.items() for value in values]
    panel.plot(*zip(*ranked, strict=True), marker="o", color=_COLOURS[0], label="ranked")
    if drawn:
        panel.scatter(*zip(*drawn, strict=True), marker="^", color=_COLOURS[1], label="random sets", s=26)
    _floor(panel, kept)
    panel.set_yscale("log")
    panel.set_xlabel("layers in triangle, of 30")
    panel.set_ylabel("KL from stock (nats a token)")
    panel.legend(frameon=False, fontsize="small")
    return figure


def _floor(panel: Any, kept: Kept) -> None:
    floor = divergence(kept, _length(kept), NOISE_FLOOR)
    if floor is not None:
        panel.axhline(max(_LEAST, floor.mean), color="black", linewidth=0.9, linestyle=":", label="noise floor")


def _length(kept: Kept) -> int:
    return min(cell["length"] for cell in kept.result["cells"])


def _parts(found: Found) -> Any:
    """A panel a parameter: the divergence of each of its values, a line a model."""
    shown = [(model, kept) for model in MODELS if (kept := found.get(f"{model.short}-shape")) is not None]
    ablations = [name for name in ("last_n", "n_local", "shape") if any(varied(kept, name) for _, kept in shown)]
    if not ablations:
        return None
    figure, panels = _figure(3.6 * len(ablations), 3.3, len(ablations), sharey=True)
    for panel, ablation in zip(panels, ablations, strict=True):
        values = {label: None for _, kept in shown for label, _ in varied(kept, ablation)}
        labels = sorted(values, key=int) if all(map(str.isdecimal, values)) else list(values)
        for number, (model, kept) in enumerate(shown):
            at = [
                (labels.index(label), divergence(kept, _length(kept), name)) for label, name in varied(kept, ablation)
            ]
            there = [(place, max(_LEAST, by.mean)) for place, by in at if by is not None]
            if there:
                style = {"color": _COLOURS[number], "marker": _MARKERS[number], "label": title(model)}
                panel.plot(*zip(*there, strict=True), linestyle="none" if ablation == "shape" else "-", **style)
        panel.set_xticks(range(len(labels)), labels, fontsize="small", rotation=20 if ablation == "shape" else 0)
        panel.set_yscale("log")
        panel.set_xlabel(ablation if ablation == "shape" else f"{ablation} (tokens)")
    panels[0].set_ylabel("KL from stock (nats a token)")
    panels[0].legend(frameon=False, fontsize="x-small")
    return figure


def _agreement(found: Found) -> Any:
    """Share of long answers that are still stock's, by token."""
    shown = [kept for model in MODELS if (kept := found.get(f"{model.short}-long")) is not None and kept.of(TRIMIX)]
    if not shown:
        return None
    figure, panels = _figure(4.6 * len(shown), 3.2, len(shown))
    for panel, kept in zip(panels, shown, strict=True):
        for number, task in enumerate(dict.fromkeys(cell["task"] for cell in kept.of(TRIMIX))):
            for name, line in ((TRIMIX, "-"), (NOISE_FLOOR, ":")):
                curve = by_place(kept, task, name)
                if curve:
                    label = task if name == TRIMIX else f"{task}, noise floor"
                    panel.plot(range(1, len(curve) + 1), curve, line, color=_COLOURS[number % 4], label=label)
        panel.set_ylim(-3, 103)
        panel.set_xlabel("token of the answer")
        panel.set_ylabel("answers that agree so far (%)")
        panel.legend(frameon=False, fontsize="x-small")
    return figure


def by_place(kept: Kept, task: str, configuration: str) -> list[float]:
    """Share of the answers, in points, whose first tokens are stock's, for each number of tokens."""
    lines = [line for line in kept.answers if line["task"] == task and line.get("tokens")]
    stock = {line["sample"]: line["tokens"] for line in lines if line["configuration"] == STOCK}
    both = [
        (line["tokens"], stock[line["sample"]])
        for line in lines
        if line["configuration"] == configuration and line["sample"] in stock
    ]
    longest = max((max(len(mine), len(dense)) for mine, dense in both), default=0)
    # Equal answers agree for ever.
    agree = [longest if mine == dense else shared_prefix(mine, dense) for mine, dense in both]
    return [100 * statistics.fmean(place <= shared for shared in agree) for place in range(1, longest + 1)]


PICTURES: tuple[tuple[str, str, Callable[[Found], Any]], ...] = (
    ("tasks", "lossless-tasks.png", _tasks),
    ("needle", "lossless-needle.png", _needle),
    ("layers", "lossless-layers.png", _layers),
    ("shape", "lossless-parts.png", _parts),
    ("long", "lossless-agreement.png", _agreement),
)
