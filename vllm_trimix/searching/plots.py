"""Plots of a search."""

from __future__ import annotations

from pathlib import Path

from vllm_trimix.searching.candidates import name_of
from vllm_trimix.searching.search import Outcome


def plot_patterns(outcome: Outcome, path: Path) -> None:
    """The chosen candidate of every head, a row a layer."""
    # Of the extra `plot`.
    import matplotlib
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure

    layers, count = list(outcome.layers), len(outcome.candidates)
    rows = [outcome.layers[layer].chosen for layer in layers]
    colours = ListedColormap([matplotlib.colormaps["tab20"](index % 20) for index in range(count)])
    size = (max(5.0, 2.6 + 0.24 * len(rows[0])), max(2.6, 1.0 + 0.24 * max(len(layers), count)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(
        rows, cmap=colours, norm=BoundaryNorm([x - 0.5 for x in range(count + 1)], count), aspect="auto"
    )
    axes.set_xlabel("query head")
    axes.set_xticks(range(0, len(rows[0]), max(1, len(rows[0]) // 16)))
    axes.set_ylabel("layer")
    step = max(1, len(layers) // 32)
    axes.set_yticks(range(0, len(layers), step), [str(layer) for layer in layers[::step]])
    bar = figure.colorbar(image, ax=axes, ticks=range(count))
    bar.ax.set_yticklabels([name_of(pattern) for pattern in outcome.candidates], fontsize="small")
    figure.savefig(path, dpi=120)


def plot_costs(outcome: Outcome, path: Path) -> None:
    """Loss against keys read: every head under every candidate, the chosen ones circled."""
    # Of the extra `plot`.
    import matplotlib
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for index, pattern in enumerate(outcome.candidates):
        points = [
            (density[index], loss[index])
            for layer, entry in outcome.layers.items()
            for density, loss in zip(entry.measured.density, outcome.losses(layer), strict=True)
        ]
        colour = matplotlib.colormaps["tab20"](index % 20)
        keys, losses = [x for x, _ in points], [y for _, y in points]
        axes.scatter(keys, losses, s=9, color=colour, alpha=0.6, label=name_of(pattern))
    chosen = outcome.heads()
    keys, losses = [head.density for head in chosen], [head.loss for head in chosen]
    axes.scatter(keys, losses, s=36, facecolors="none", edgecolors="black", linewidths=0.6, label="chosen")
    axes.axvline(outcome.budget.share, color="#999999", linewidth=0.8, linestyle="--")
    axes.set_yscale("symlog", linthresh=1e-3)
    axes.set_ylim(bottom=-1e-4)
    axes.set_xlabel("keys read, of dense attention's")
    axes.set_ylabel("error of the layer's output" if outcome.score == "output-error" else "attention lost")
    axes.legend(frameon=False, fontsize="x-small")
    figure.savefig(path, dpi=120)
