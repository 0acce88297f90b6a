"""A probe's pictures."""

from __future__ import annotations

import statistics
from pathlib import Path

from vllm_trimix.probing.choice import MAX_LOSS
from vllm_trimix.probing.gradient import SECTIONS
from vllm_trimix.probing.outcome import Outcome

_COLOURS = {"streaming": "#56B4E9", "last": "#E69F00", "middle": "#D55E00"}
_LINES = ("#D55E00", "#0072B2")
_MARKS = ("o", "s", "^", "D")


def _layers(outcome: Outcome) -> int:
    return len(outcome.stock) + len(outcome.orders[outcome.settings.orders[0]])


def plot_importance(outcome: Outcome, path: Path) -> None:
    """Importance by layer and section; chosen layers shaded."""
    # Of the extra `plot`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.28 * _layers(outcome)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    layers = list(range(_layers(outcome)))
    for layer in outcome.chosen:
        axes.axvspan(layer - 0.5, layer + 0.5, color="#009E73", alpha=0.12, linewidth=0)
    if outcome.scores is not None:
        rows = outcome.scores[outcome.settings.score]
        for index, section in enumerate(SECTIONS):
            offsets = [layer + 0.27 * (index - 1) for layer in layers]
            heights = [row[index] for row in rows]
            axes.bar(offsets, heights, width=0.27, color=_COLOURS[section], label=f"{section} Q-K")
        axes.set_ylabel(outcome.settings.score)
        axes.legend(frameon=False)
        largest = max(max(row) for row in rows)
        if largest > 0:
            # Layers differ by orders of magnitude; what is 1e-6 of the largest is nothing.
            axes.set_yscale("symlog", linthresh=largest * 1e-6)
    else:
        assert outcome.ablation is not None
        axes.bar(layers, [statistics.fmean(row) for row in outcome.ablation], color=_COLOURS["middle"])
        axes.set_ylabel("divergence with this layer alone in triangle (nats)")
    axes.set_xlabel("layer (shaded: triangle)")
    axes.set_xticks(layers[:: max(1, len(layers) // 16)])
    figure.savefig(path, dpi=120)


def plot_quality(outcome: Outcome, path: Path) -> None:
    """Losses against k: lines for the prompts that ranked, marks with bounds for the held-out ones."""
    # Of the extra `plot`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    colours = dict(zip(outcome.curve, _LINES, strict=False))
    for name, means in outcome.curve.items():
        values = [0.0, *means.values()]
        axes.plot([0, *means], values, color=colours[name], linewidth=1.5, marker=".", label=f"{name}, ranking")
    for tried, mark in zip(outcome.tried, _MARKS * len(outcome.tried), strict=False):
        for k in tried.losses:
            mean = max(statistics.fmean(tried.losses[k]), statistics.fmean(tried.kl[k]))
            label = f"{tried.order}, held out, {tried.length} tokens" if k == min(tried.losses) else None
            axes.errorbar(
                [k],
                [mean],
                yerr=[[0.0], [tried.bound(k) - mean]],
                color=colours[tried.order],
                marker=mark,
                markersize=4,
                capsize=3,
                linewidth=1,
                linestyle="none",
                label=label,
            )
    axes.axhline(MAX_LOSS, color="black", linewidth=0.8)
    axes.axvline(len(outcome.chosen), color="#009E73", linewidth=1)
    axes.set_yscale("symlog", linthresh=MAX_LOSS)
    # A divergence is never negative.
    axes.set_ylim(bottom=-0.2 * MAX_LOSS)
    axes.set_xlabel("k layers in triangle")
    axes.set_ylabel("loss or divergence, whichever is more (nats)")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
