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
from vllm_trimix.probing import words
from vllm_trimix.probing.choice import CONFIDENCE, MAX_LOSS, upper_bound
from vllm_trimix.probing.gradient import SECTIONS
from vllm_trimix.probing.outcome import Outcome, Tried
from vllm_trimix.probing.plots import plot_importance, plot_quality

_RANKINGS = {"gradient": "Middle Q-K {score}", "ablation": "divergence with that layer alone in triangle"}


def write(folder: Path, outcome: Outcome, *, environment: dict[str, str], kinds: list[str], command: str) -> None:
    """Writes ``scores.json``, ``report.md``, ``importance.png`` and ``quality.png``, and a preset where one is proven.

    Args:
        folder: Where to; it exists.
        outcome: What was found.
        environment: Device and versions.
        kinds: What there is to say of the prompts.
        command: How to repeat it.
    """
    preset = folder / "preset.json"
    if outcome.chosen:
        preset.write_text(json.dumps(preset_of(outcome, environment), indent=2) + "\n")
    else:
        preset.unlink(missing_ok=True)
    scores = {**asdict(outcome), "sections": SECTIONS, "environment": environment, "prompts": kinds}
    (folder / "scores.json").write_text(json.dumps(scores, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(outcome, environment, kinds, command), encoding="utf-8")
    plot_importance(outcome, folder / "importance.png")
    plot_quality(outcome, folder / "quality.png")


def preset_of(outcome: Outcome, environment: dict[str, str]) -> dict[str, Any]:
    """The preset as ``{"trimix": {"preset": FILE}}`` takes it."""
    pattern, settings, k = outcome.settings.pattern, outcome.settings, len(outcome.chosen)
    order = settings.orders[0]
    proofs = [
        f"{tried.bound(k):.4f} nats at {tried.length} tokens ({len(tried.losses[k])} held-out prompts)"
        for tried in outcome.tried
        if tried.order == order
    ]
    what = "lose and diverge by" if outcome.reference == "answers" else "diverge from the dense ones by"
    return {
        "layers": format_layers(outcome.chosen),
        "n_init": pattern.n_init,
        "n_local": pattern.n_local,
        "last_n": pattern.last_n,
        "provenance": {
            "source": f"vllm-trimix probe {__version__}: the {words.layers(k)} of least {_ranking(outcome, order)} of "
            f"{settings.model}",
            "date": datetime.date.today().isoformat(),
            "measured": f"answers {what} at most {', '.join(proofs)} on average (95%); {environment['device']}, "
            f"torch {environment['torch']}, transformers {environment['transformers']}, {settings.dtype}",
        },
    }


def _ranking(outcome: Outcome, order: str) -> str:
    return _RANKINGS[order].format(score=outcome.settings.score)


def markdown(outcome: Outcome, environment: dict[str, str], kinds: list[str], command: str) -> str:
    """The report."""
    settings, pattern = outcome.settings, outcome.settings.pattern
    versions = ", ".join(f"{name} {value}" for name, value in environment.items() if name != "device")
    what = "what the right answer's log-probability loses" if outcome.reference == "answers" else "the divergence"
    lines = [
        f"# Layer probe of {settings.model}",
        "",
        f"**Triangle layers: {format_layers(outcome.chosen) or 'none'}** ({words.count(outcome)}).",
        "",
        *(f"- {line}" for line in (*words.screened(outcome), *words.verdict(outcome))),
        f"- Pattern: n_init {pattern.n_init}, n_local {pattern.n_local}, last_n {pattern.last_n}.",
        f"- Prompts: {settings.scored} to rank, {outcome.plan.samples} held out at each of "
        f"{', '.join(map(str, settings.lengths))} tokens{''.join(f'; {kind}' for kind in kinds)}.",
        f"- Loss: {what}, in nats. Divergence (KL): KL(dense || now) over the whole vocabulary, summed over the "
        "answer's tokens. Mean log-probability of the held-out answers, dense: "
        f"{statistics.fmean(outcome.logprobs):.3f}.",
        f"- Control: with distant keys hidden from all rows of all layers answers lose {outcome.control:.3f} nats.",
        "- Choice: few k where losses begin to grow, tried in ascending order up to the first that fails. A k holds "
        f"if the upper ends of the one-sided {CONFIDENCE:.0%} intervals of its mean loss and of its mean divergence "
        f"are at most {MAX_LOSS} nats, at every length.",
        f"- {environment['device']}; {versions}; {settings.dtype}.",
        f"- Repeat: `{command}`",
        "",
    ]
    if outcome.stock:
        lines += [f"{words.stock_sentence(outcome)} They stay as they are: not ranked, not in the preset.", ""]
    lines += ["![importance](importance.png)", "", "![quality](quality.png)", "", *_layer_table(outcome), ""]
    lines += [*_curve_table(outcome), ""]
    for tried in outcome.tried:
        lines += [*_tried_table(outcome, tried), ""]
    lines += [*_compared_table(outcome), ""]
    return "\n".join(lines)


def _layer_table(outcome: Outcome) -> list[str]:
    """A row a layer: what each ranking found of it, and the chosen set."""
    scores, ablation = outcome.scores or {}, outcome.ablation
    names = [*scores, *(["ablation (KL)"] if ablation else [])]
    lines = [
        "## Middle Q-K by layer",
        "",
        f"| layer | {' | '.join(names)} | rank | triangle |",
        "|---" * (len(names) + 3) + "|",
    ]
    ranked = outcome.orders[outcome.settings.orders[0]]
    for layer in range(len(ranked) + len(outcome.stock)):
        if layer in outcome.stock:
            lines.append(f"| {layer} | {' | '.join(['-'] * len(names))} | - | {words.STOCK[outcome.stock[layer]]} |")
            continue
        values = [f"{rows[layer][SECTIONS.index('middle')]:.3g}" for rows in scores.values()]
        values += [f"{statistics.fmean(ablation[layer]):.3g}"] if ablation else []
        chosen = "yes" if layer in outcome.chosen else ""
        lines.append(f"| {layer} | {' | '.join(values)} | {ranked.index(layer) + 1} | {chosen} |")
    if outcome.correlations:
        found = ", ".join(f"{name} {value:.2f}" for name, value in outcome.correlations.items())
        lines += ["", f"Rank correlation (Spearman) with the measured divergence: {found}."]
    if len(outcome.kept) > 1:
        lines += ["", f"Layers kept: {', '.join(f'{k} by {name}' for name, k in outcome.kept.items())}."]
    return lines


def _curve_table(outcome: Outcome) -> list[str]:
    """Mean losses of the prompts that ranked: where the k to try come from."""
    lines = ["## The prompts that ranked, with k layers in triangle: loss or divergence, whichever is more (nats)", ""]
    lines += [f"| k | {' | '.join(outcome.curve)} |", "|---" * (len(outcome.curve) + 1) + "|"]
    for k in next(iter(outcome.curve.values())):
        lines.append(f"| {k} | {' | '.join(f'{losses[k]:.4f}' for losses in outcome.curve.values())} |")
    return lines


def _tried_table(outcome: Outcome, tried: Tried) -> list[str]:
    """A row a k: mean loss, its bound, divergence, and answers kept."""
    dense = f"dense {tried.correct[0]:.0%}"
    lines = [
        f"## Held-out answers at {tried.length} tokens, k layers by {tried.order} ({dense} the likeliest)",
        "",
        "| k | loss (nats) | at most | KL (nats) | at most | answers the likeliest |",
        "|---|---|---|---|---|---|",
    ]
    first = tried.order == outcome.settings.orders[0]
    for k in sorted(tried.losses):
        mark = " (chosen)" if first and k == len(outcome.chosen) else ""
        losses = tried.losses[k]
        lines.append(
            f"| {k}{mark} | {statistics.fmean(losses):.4f} | {upper_bound(losses):.4f} | "
            f"{statistics.fmean(tried.kl[k]):.4f} | {upper_bound(tried.kl[k]):.4f} | {tried.correct[k]:.0%} |"
        )
    return lines


def _compared_table(outcome: Outcome) -> list[str]:
    """The same number of layers by other orders."""
    order = outcome.settings.orders[0]
    first = next(tried for tried in outcome.tried if tried.order == order)
    k = len(outcome.chosen) or outcome.kept[order] or min(first.losses)
    count = len(next(iter(outcome.compared.values())))
    lines = [
        f"## Other sets of {words.layers(k)}, {count} held-out answers at {first.length} tokens",
        "",
        "| layers | KL (nats) |",
        "|---|---|",
        f"| by {order} | {statistics.fmean(first.kl[k][:count]):.4f} |",
    ]
    return lines + [f"| {name} | {statistics.fmean(losses):.4f} |" for name, losses in outcome.compared.items()]
