"""What a probe leaves in its folder: preset, scores, report and plots."""

from __future__ import annotations

import datetime
import json
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vllm_trimix import __version__
from vllm_trimix.config.layers import format_layers
from vllm_trimix.probing.choice import CONFIDENCE, MAX_DROP, upper_bound
from vllm_trimix.probing.gradient import SECTIONS
from vllm_trimix.probing.probe import Outcome

_WORDS = {
    "no_attention": "no attention",
    "sliding_window": "a sliding window of their own",
    "chunked_attention": "chunked attention",
    "learned_sinks": "learned sinks",
    "position_bias": "a position bias",
    "not_decoder": "no causal attention",
    "kv_sharing": "another layer's keys and values",
}
_COLOURS = {"streaming": "#56B4E9", "last": "#E69F00", "middle": "#D55E00"}


def write(folder: Path, outcome: Outcome, *, environment: dict[str, str], prompts: list[str], command: str) -> Path:
    """Writes ``preset.json``, ``scores.json``, ``report.md``, ``importance.png`` and ``quality.png``.

    Args:
        folder: Where to; it exists.
        outcome: What was found.
        environment: Device and versions.
        prompts: One line for each kind of prompt.
        command: How to repeat it.

    Returns:
        The preset.
    """
    preset = folder / "preset.json"
    preset.write_text(json.dumps(preset_of(outcome, environment, prompts), indent=2) + "\n")
    scores = {**asdict(outcome), "sections": SECTIONS, "environment": environment, "prompts": prompts}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(outcome, environment, prompts, command), encoding="utf-8")
    plot_importance(outcome, folder / "importance.png")
    plot_quality(outcome, folder / "quality.png")
    return preset


def preset_of(outcome: Outcome, environment: dict[str, str], prompts: list[str]) -> dict[str, Any]:
    """The preset as ``{"trimix": {"preset": FILE}}`` takes it."""
    pattern, settings = outcome.settings.pattern, outcome.settings
    k = len(outcome.chosen)
    drops = outcome.drops["importance"][k]
    by = f"Middle Q-K {settings.score}" if settings.method != "ablation" else "ablation of Middle Q-K"
    return {
        "layers": format_layers(outcome.chosen) if outcome.chosen else "",
        "n_init": pattern.n_init,
        "n_local": pattern.n_local,
        "last_n": pattern.last_n,
        "provenance": {
            "source": f"vllm-trimix probe {__version__}: the {k} layers of least {by} of {settings.model}",
            "date": datetime.date.today().isoformat(),
            "measured": f"answers lose {statistics.fmean(drops):.4f} nats on average, at most {upper_bound(drops):.4f} "
            f"(95%), {len(drops)} held-out prompts ({'; '.join(prompts)}); {environment['device']}, "
            f"torch {environment['torch']}, transformers {environment['transformers']}, {settings.dtype}",
        },
    }


def markdown(outcome: Outcome, environment: dict[str, str], prompts: list[str], command: str) -> str:
    """The report."""
    pattern = outcome.settings.pattern
    versions = ", ".join(f"{name} {value}" for name, value in environment.items() if name != "device")
    dense = statistics.fmean(outcome.correct["importance"][:1])
    lines = [
        f"# Layer probe of {outcome.settings.model}",
        "",
        f"**Triangle layers: {format_layers(outcome.chosen)}** ({count(outcome)}).",
        "",
        f"- Pattern: n_init {pattern.n_init}, n_local {pattern.n_local}, last_n {pattern.last_n}.",
        f"- Prompts: {'; '.join(prompts)}; half of them held out for the choice.",
        f"- Held-out answers, dense: {dense:.0%} the likeliest token by token, mean log-probability "
        f"{statistics.fmean(outcome.logprobs):.3f} nats.",
        f"- Choice: the largest k whose answers lose at most {MAX_DROP} nats on average, by the upper end of its "
        f"one-sided {CONFIDENCE:.0%} interval.",
        f"- {environment['device']}; {versions}; {outcome.settings.dtype}.",
        f"- Repeat: `{command}`",
        "",
    ]
    if dense < 0.5:
        lines += [
            "**The model rarely gives these answers even densely: the choice proves little. "
            "Take prompts that it can answer.**",
            "",
        ]
    if outcome.stock:
        lines += [f"{stock_sentence(outcome.stock)} They stay as they are: not ranked, not in the preset.", ""]
    lines += ["![importance](importance.png)", "", "![quality](quality.png)", "", *_layer_table(outcome), ""]
    lines += [*_quality_table(outcome), ""]
    return "\n".join(lines)


def count(outcome: Outcome) -> str:
    """How many layers are chosen, of how many."""
    layers = len(outcome.importance)
    able = f"{layers - len(outcome.stock)} that can be, in a model of " if outcome.stock else ""
    return f"{len(outcome.chosen)} of {able}{layers}"


def stock_sentence(stock: dict[int, str]) -> str:
    """Which layers can't be triangle layers, and why."""
    reasons = dict.fromkeys(stock.values())
    groups = ((format_layers([layer for layer in stock if stock[layer] == reason]), reason) for reason in reasons)
    return "Layers without a choice: " + "; ".join(f"{layers} ({_WORDS[reason]})" for layers, reason in groups) + "."


def _layer_table(outcome: Outcome) -> list[str]:
    """A row a layer: every score of the Middle section, and the chosen set."""
    scores, ablation = outcome.scores or {}, outcome.ablation
    names = [*scores, *(["ablation (nats)"] if ablation else [])]
    lines = [
        "## Middle Q-K by layer",
        "",
        f"| layer | {' | '.join(names)} | rank | triangle |",
        "|---" * (len(names) + 3) + "|",
    ]
    ranked = outcome.orders["importance"]
    for layer in range(len(outcome.importance)):
        if layer in outcome.stock:
            lines.append(f"| {layer} | {' | '.join(['-'] * len(names))} | - | {_WORDS[outcome.stock[layer]]} |")
            continue
        values = [f"{rows[layer][SECTIONS.index('middle')]:.3g}" for rows in scores.values()]
        values += [f"{statistics.fmean(ablation[layer]):.3g}"] if ablation else []
        rank = str(ranked.index(layer) + 1) if layer in ranked else "-"
        lines.append(f"| {layer} | {' | '.join(values)} | {rank} | {'yes' if layer in outcome.chosen else ''} |")
    return lines


def _quality_table(outcome: Outcome) -> list[str]:
    """A row a k: mean drop of every order, the bound of the chosen one, and right answers."""
    lines = [
        "## Answers with k layers in triangle",
        "",
        f"| k | {' | '.join(f'{name}: drop (nats)' for name in outcome.orders)} | upper bound | answers kept |",
        "|---" * (len(outcome.orders) + 3) + "|",
    ]
    for k, values in enumerate(outcome.drops["importance"]):
        means = " | ".join(f"{statistics.fmean(rows[k]):.4f}" for rows in outcome.drops.values())
        mark = " (chosen)" if k == len(outcome.chosen) else ""
        kept = outcome.correct["importance"][k]
        lines.append(f"| {k}{mark} | {means} | {upper_bound(values):.4f} | {kept:.0%} |")
    return lines


def plot_importance(outcome: Outcome, path: Path) -> None:
    """Importance by layer and section; chosen layers shaded."""
    # Of the extra `plot`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(max(6.0, 0.28 * len(outcome.importance)), 3.6), layout="constrained")
    axes = figure.add_subplot()
    layers = list(range(len(outcome.importance)))
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
        axes.bar(layers, outcome.importance, color=_COLOURS["middle"])
        axes.set_ylabel("nats lost without Middle Q-K")
    axes.set_xlabel("layer (shaded: triangle)")
    axes.set_xticks(layers[:: max(1, len(layers) // 16)])
    figure.savefig(path, dpi=120)


def plot_quality(outcome: Outcome, path: Path) -> None:
    """Mean drop against k, one line an order."""
    # Of the extra `plot`.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    for name, rows in outcome.drops.items():
        means = [statistics.fmean(values) for values in rows]
        style: dict[str, Any] = {"color": "#999999", "linewidth": 1, "linestyle": ":"}
        if name == "importance":
            style = {"color": _COLOURS["middle"], "linewidth": 2}
            bounds = [upper_bound(values) for values in rows]
            axes.fill_between(range(len(rows)), means, bounds, color=_COLOURS["middle"], alpha=0.2, linewidth=0)
        elif name == "deepest":
            style = {"color": "#0072B2", "linewidth": 1.5, "linestyle": "--"}
        axes.plot(range(len(rows)), means, label=name, **style)
    axes.axhline(MAX_DROP, color="black", linewidth=0.8)
    axes.axvline(len(outcome.chosen), color="#009E73", linewidth=1)
    axes.set_yscale("symlog", linthresh=MAX_DROP)
    lowest = min(statistics.fmean(values) for rows in outcome.drops.values() for values in rows)
    axes.set_ylim(bottom=min(-0.5 * MAX_DROP, 1.5 * lowest))
    axes.set_xlabel("k layers in triangle")
    axes.set_ylabel("answer's log-probability lost (nats)")
    axes.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=120)
