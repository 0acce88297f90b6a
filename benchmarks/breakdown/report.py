"""What a breakdown found, as Markdown and as stacked bars."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from benchmarks.breakdown.timeline import CATEGORIES

REFUSED_FIX = "Run it again with the machine to itself, or with more --repeats."
# Okabe and Ito's palette, distinguishable under every colour blindness.
COLOURS = {
    "linear": "#0072B2",
    "dense attention": "#E69F00",
    "triangle body": "#009E73",
    "tail": "#56B4E9",
    "plan": "#D55E00",
    "scheduler": "#CC79A7",
    "other": "#BBBBBB",
}


def report(result: dict[str, Any]) -> str:
    """Device, versions and date, then the tables, as Markdown."""
    env, settings = result["environment"], result["settings"]
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    cpu = f"{env['cpu']}, core(s) {settings['cpus']}, AMX {env['amx']}"
    device = env["gpu"] if result["rows"][0]["device"] == "cuda" else cpu
    entries = "; ".join(
        f"{name} = " + ("stock vLLM" if trimix is None else f"`{json.dumps(trimix)}`")
        for name, trimix in settings["configurations"].items()
    )
    return (
        f"{device}; {versions}; {env['date']}; commit {env['commit']}; model {settings['model']}, "
        f"`{shlex.join(settings['engine_args'])}`; {entries}; median of {settings['repeats']}.\n\n"
        f"![Where a prefill's time goes](breakdown.png)\n\n{table(result['rows'])}"
    )


def table(rows: list[dict[str, Any]]) -> str:
    """One Markdown table per length: seconds and share by category and configuration."""
    lines = []
    for length in dict.fromkeys(row["length"] for row in rows):
        mine = [row for row in rows if row["length"] == length]
        lines += [
            f"**{length} prompt tokens, one request**",
            "",
            "| seconds | " + " | ".join(row["config"] for row in mine) + " |",
            "|---|" + "---:|" * len(mine),
        ]
        for category in CATEGORIES:
            cells = [
                f"{_seconds(row['seconds'][category])} ({_percent(row['share'][category])})"
                if row["status"] == "ok"
                else "refused"
                for row in mine
            ]
            lines.append(f"| {category} | " + " | ".join(cells) + " |")
        for title, cell in (
            ("**sum (profiled)**", lambda row: f"**{row['profiled_s']:.3f}**"),
            ("without the profiler", lambda row: f"{row['wall_s']:.3f}"),
            ("profiler overhead", lambda row: f"{row['overhead']:+.1%}"),
            ("of the engine thread's CPU time", lambda row: f"{row['cpu_overhead']:+.1%}"),
            ("engine steps", lambda row: str(row["steps"])),
        ):
            lines.append(f"| {title} | " + " | ".join(map(cell, mine)) + " |")
        lines.append("")
        for row in mine:
            if row["status"] != "ok":
                lines += [f"{row['config']}: {row['status']}. {REFUSED_FIX}", ""]
    return "\n".join(lines)


def _seconds(value: float) -> str:
    """Four decimals, and none where nothing ran."""
    return f"{value:.4f}" if value else "0"


def _percent(share: float) -> str:
    return "0%" if not share else "<0.1%" if share < 0.001 else f"{share:.1%}"


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Stacked bars, one panel per length with a time axis of its own, one bar per configuration."""
    # Heavy, and only for the plot.
    import matplotlib as mpl

    mpl.use("Agg")
    # After the choice of how to draw.
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    lengths = list(dict.fromkeys(row["length"] for row in rows))
    panels = [[row for row in rows if row["length"] == length] for length in lengths]
    bars = sum(map(len, panels))
    figure, axes = plt.subplots(
        len(lengths),
        1,
        squeeze=False,
        figsize=(9, 1.1 + 0.75 * len(lengths) + 0.5 * bars),
        height_ratios=[len(panel) for panel in panels],
        layout="constrained",
    )
    for axis, panel, length in zip(axes[:, 0], panels, lengths, strict=True):
        _panel(axis, panel, length)
    axes[-1, 0].set_xlabel("seconds (profiled)")
    legend = [Patch(color=COLOURS[category], label=category) for category in CATEGORIES]
    figure.legend(handles=legend, loc="outside upper center", ncols=len(CATEGORIES), frameon=False, handlelength=1.2)
    figure.savefig(path, dpi=200)
    plt.close(figure)


def _panel(axis: Any, rows: list[dict[str, Any]], length: int) -> None:
    longest = max((row["profiled_s"] for row in rows if row["status"] == "ok"), default=1.0)
    for index, row in enumerate(rows):
        end = 0.0
        if row["status"] != "ok":
            axis.text(0, index, f" {row['status']}", va="center")
            continue
        for category in CATEGORIES:
            seconds = row["seconds"][category]
            axis.barh(index, seconds, left=end, color=COLOURS[category], height=0.7, edgecolor="white", linewidth=0.5)
            if seconds > 0.045 * longest:
                colour = "white" if category in ("linear", "triangle body", "plan") else "black"
                label = f"{row['share'][category]:.0%}"
                axis.text(end + seconds / 2, index, label, ha="center", va="center", color=colour, fontsize=9)
            end += seconds
        # Too thin to see in the bar, and asked for.
        thin = ", ".join(
            f"{category} {1e3 * row['seconds'][category]:.1f} ms"
            for category in ("plan", "scheduler")
            if row["seconds"][category]
        )
        axis.text(end + 0.01 * longest, index - 0.14, f"{end:.3g} s", va="center", fontweight="bold")
        axis.text(end + 0.01 * longest, index + 0.2, thin, va="center", fontsize=7.5, color="#444444")
    axis.set_yticks(range(len(rows)), [row["config"] for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlim(0, 1.32 * longest)
    axis.set_title(f"{length:,} prompt tokens", loc="left", fontsize=10)
    axis.spines[["top", "right"]].set_visible(False)
