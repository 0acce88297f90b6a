"""Plots of an evaluation: bars a task, a heat-map of depths, lines an ablation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_trimix.evaluation.cells import Result
from vllm_trimix.evaluation.configurations import STOCK, Configuration
from vllm_trimix.evaluation.sample import Measure

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
_MAX_PANELS = 6


def draw(folder: Path, results: Sequence[Result], configurations: Sequence[Configuration]) -> list[str]:
    """Draws what fits the results; returns the names of the files, in the order to show them."""
    drawn = []
    plain = [c for c in configurations if not c.ablation]
    if any(result.depths for result in results):
        for task in dict.fromkeys(r.task for r in results if r.depths):
            name = f"depths-{task}.png"
            _heat_map(folder / name, [r for r in results if r.task == task], plain)
            drawn.append(name)
    elif any(r.configuration != STOCK for r in results):
        _bars(folder / "tasks.png", results, plain)
        drawn.append("tasks.png")
    for ablation in dict.fromkeys(c.ablation for c in configurations if c.ablation):
        name = f"ablation-{ablation}.png"
        _lines(folder / name, results, [c for c in configurations if c.ablation == ablation])
        drawn.append(name)
    return drawn


def _figure(width: float, height: float, columns: int, rows: int = 1) -> tuple[Any, Any]:
    # Of the extra `plot`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def _unit(measure: str) -> tuple[float, str]:
    """What a score is multiplied with, and the axis's label."""
    return (1.0, "nats a token (lower is better)") if measure == Measure.PERPLEXITY else (100.0, "score (points)")


def _bars(path: Path, results: Sequence[Result], configurations: Sequence[Configuration]) -> None:
    """A panel a length, a group of bars a task; whiskers are the 95% interval of the difference to stock."""
    lengths = list(dict.fromkeys(r.length for r in results))[-_MAX_PANELS:]
    tasks = list(dict.fromkeys(r.task for r in results))
    names = [c.name for c in configurations]
    scale, label = _unit(results[0].measure)
    columns = min(2, len(lengths))
    rows = -(-len(lengths) // columns)
    figure, axes = _figure(max(5.0, 0.35 * len(tasks) * len(names)) * columns, 3.2 * rows, columns, rows)
    flat = list(axes.flat)
    for panel, length in zip(flat, lengths, strict=False):
        at = {(r.task, r.configuration): r for r in results if r.length == length}
        width = 0.8 / len(names)
        for number, name in enumerate(names):
            there = [(place, at[task, name]) for place, task in enumerate(tasks) if (task, name) in at]
            there = [(place, r) for place, r in there if r.score is not None]
            offsets = [place + width * (number - (len(names) - 1) / 2) for place, _ in there]
            heights = [scale * r.score for _, r in there if r.score is not None]
            colour = _COLOURS[number % len(_COLOURS)]
            panel.bar(offsets, heights, width=width, color=colour, label=name)
            _whiskers(panel, offsets, [r for _, r in there], at, scale)
        panel.set_title(f"{length} tokens", fontsize="medium")
        panel.set_xticks(range(len(tasks)), tasks, rotation=40, ha="right", fontsize="small")
        panel.set_ylabel(label)
        if scale != 1.0:
            panel.set_ylim(0, 105)
    for panel in flat[len(lengths) :]:
        panel.set_axis_off()
    handles, labels = flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, frameon=False, fontsize="small", loc="outside upper center", ncols=len(labels))
    figure.savefig(path, dpi=110)


def _whiskers(
    panel: Any, offsets: Sequence[float], there: Sequence[Result], at: dict[tuple[str, str], Result], scale: float
) -> None:
    for offset, result in zip(offsets, there, strict=True):
        stock, by = at.get((result.task, STOCK)), result.difference
        if by is None or stock is None or stock.score is None or result.score is None:
            continue
        # Of perplexity the difference's sign is turned.
        sign = -1 if result.measure == Measure.PERPLEXITY else 1
        ends = sorted(scale * (stock.score + sign * end) for end in (by.low, by.high))
        panel.plot([offset, offset], ends, color="black", linewidth=1, clip_on=True)


def _heat_map(path: Path, results: Sequence[Result], configurations: Sequence[Configuration]) -> None:
    """A panel a configuration: depth down, length across, the score as colour and number."""
    names = [c.name for c in configurations if any(r.configuration == c.name and r.depths for r in results)]
    lengths = list(dict.fromkeys(r.length for r in results))
    depths = sorted({depth for r in results for depth in r.depths}, key=float)
    size = (1.4 + 0.62 * len(lengths)) * len(names) + 1, 1.2 + 0.34 * len(depths)
    figure, axes = _figure(*size, len(names))
    picture = None
    for panel, name in zip(axes[0], names, strict=True):
        at = {r.length: r.depths for r in results if r.configuration == name}
        grid = [[at.get(length, {}).get(depth, float("nan")) for length in lengths] for depth in depths]
        # Dark to light reads without colour vision, too.
        picture = panel.imshow(grid, vmin=0, vmax=1, cmap="viridis", aspect="auto")
        for row, values in enumerate(grid):
            for column, value in enumerate(values):
                if value == value:
                    colour = "white" if value < 0.6 else "black"
                    panel.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=7)
        panel.set_title(name, fontsize="medium")
        panel.set_xticks(range(len(lengths)), [_short(length) for length in lengths], fontsize="small")
        panel.set_yticks(range(len(depths)), [f"{100 * float(depth):.0f}%" for depth in depths], fontsize="small")
        panel.set_xlabel("tokens")
    axes[0][0].set_ylabel("depth of the needle")
    if picture is not None:
        figure.colorbar(picture, ax=list(axes[0]), label="score", shrink=0.9)
    figure.savefig(path, dpi=110)


def _short(length: int) -> str:
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)


def _lines(path: Path, results: Sequence[Result], configurations: Sequence[Configuration]) -> None:
    """A line a task: mean score over the lengths against the ablation's values; dotted is stock."""
    tasks = list(dict.fromkeys(r.task for r in results if r.configuration in {c.name for c in configurations}))
    if not tasks:
        return
    scale, label = _unit(results[0].measure)
    values = [c.value for c in configurations]
    figure, axes = _figure(6.0, 3.4, 1)
    panel = axes[0][0]
    for number, task in enumerate(tasks):
        colour = _COLOURS[number % len(_COLOURS)]
        panel.plot(
            range(len(values)),
            [_mean(results, task, c.name, scale) for c in configurations],
            marker="o",
            color=colour,
            label=task,
        )
        panel.axhline(_mean(results, task, STOCK, scale), color=colour, linewidth=0.8, linestyle=":")
    panel.set_xticks(range(len(values)), values, rotation=30 if max(map(len, values)) > 5 else 0, fontsize="small")
    panel.set_xlabel(configurations[0].ablation)
    panel.set_ylabel(label)
    if scale != 1.0:
        panel.set_ylim(-3, 105)
    panel.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=110)


def _mean(results: Sequence[Result], task: str, name: str, scale: float) -> float:
    scores = [r.score for r in results if r.task == task and r.configuration == name and r.score is not None]
    return scale * sum(scores) / len(scores) if scores else float("nan")
