"""What a search leaves in its folder: head file, every figure, report and plots."""

from __future__ import annotations

import datetime
import json
import statistics
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from vllm_trimix import __version__
from vllm_trimix.config.head_files import write_head_file
from vllm_trimix.config.layers import format_layers
from vllm_trimix.searching.candidates import name_of
from vllm_trimix.searching.plots import plot_costs, plot_patterns
from vllm_trimix.searching.search import Head, Outcome

POOR = 0.1
"""An error of a layer's output, or a share of attention lost, that the report points at."""

_WORST = 10


class Source(NamedTuple):
    """Where an outcome comes from.

    Attributes:
        environment: Device and versions.
        prompts: One line for each kind of prompt.
        command: How to repeat it.
    """

    environment: dict[str, str]
    prompts: list[str]
    command: str


def write(folder: Path, outcome: Outcome, source: Source) -> Path:
    """Writes ``heads.json``, ``search.json``, ``report.md``, ``patterns.png`` and ``costs.png``.

    Args:
        folder: Where to; it exists.
        outcome: What was found.
        source: Where it comes from.

    Returns:
        The head file.
    """
    path = folder / "heads.json"
    write_head_file(path, outcome.patterns(), model=outcome.settings.model, provenance=provenance(outcome, source))
    (folder / "search.json").write_text(json.dumps(figures(outcome, source), indent=1) + "\n")
    (folder / "report.md").write_text(markdown(outcome, source), encoding="utf-8")
    plot_patterns(outcome, folder / "patterns.png")
    plot_costs(outcome, folder / "costs.png")
    return path


def poor_heads(outcome: Outcome) -> list[Head]:
    """Heads that no affordable candidate serves, the worst first."""
    return sorted((head for head in outcome.heads() if head.loss > POOR), key=lambda head: -head.loss)


def provenance(outcome: Outcome, source: Source) -> dict[str, Any]:
    """What a head file says of itself."""
    settings = outcome.settings
    return {
        "source": f"vllm-trimix search {__version__}",
        "date": datetime.date.today().isoformat(),
        "versions": source.environment,
        "dtype": settings.dtype,
        "prompts": source.prompts,
        "prompts_hash": settings.prompts,
        "last_n": settings.last_n,
        "chunk": settings.chunk,
        "candidates": [name_of(pattern) for pattern in outcome.candidates],
        "score": outcome.score,
        "budget": {"share": outcome.budget.share, "of": outcome.budget.of},
        "tolerance": outcome.tolerance,
        "mean_density": outcome.density,
        "mean_layer_error": statistics.fmean(layer.error for layer in outcome.layers.values()),
        "answers": _answers(outcome),
        "command": source.command,
    }


def figures(outcome: Outcome, source: Source) -> dict[str, Any]:
    """Every score and cost."""
    return {
        **provenance(outcome, source),
        "settings": asdict(outcome.settings),
        "unweighted_layers": outcome.unweighted,
        "layers": {
            str(layer): {"chosen": entry.chosen, "error": entry.error, "mean": asdict(entry.measured)}
            for layer, entry in outcome.layers.items()
        },
        "by_prompt": [{str(layer): asdict(item) for layer, item in prompt.items()} for prompt in outcome.prompts],
        "dense_answers": [asdict(item) for item in outcome.dense],
        "sparse_answers": [asdict(item) for item in outcome.sparse],
    }


def _answers(outcome: Outcome) -> dict[str, float] | None:
    """Right answers, and what they lost; None without answers."""
    if not outcome.dense:
        return None
    drops = [a.logprob - b.logprob for a, b in zip(outcome.dense, outcome.sparse, strict=True)]
    return {
        "asked": len(outcome.dense),
        "right_dense": sum(item.correct for item in outcome.dense),
        "right_sparse": sum(item.correct for item in outcome.sparse),
        "mean_nats_lost": statistics.fmean(drops),
        "most_nats_lost": max(drops),
    }


def answers_line(outcome: Outcome) -> str:
    """The check of the choice on the model itself, in a sentence."""
    found = _answers(outcome)
    if found is None:
        return "No prompt has an answer: what the choice does to the model's answers is not checked."
    doubt = " The model rarely gives these answers even densely: the check proves little."
    return (
        f"Answers with the choice in place: {found['right_sparse']:.0f} of {found['asked']:.0f} right, dense "
        f"{found['right_dense']:.0f}; they lose {found['mean_nats_lost']:.4f} nats on average, "
        f"{found['most_nats_lost']:.4f} at most.{doubt if 2 * found['right_dense'] < found['asked'] else ''}"
    )


def markdown(outcome: Outcome, source: Source) -> str:
    """The report."""
    settings, budget = outcome.settings, outcome.budget
    versions = ", ".join(f"{name} {value}" for name, value in source.environment.items() if name != "device")
    spread = "each head at most" if budget.of == "head" else "each layer's heads together at most"
    heads = outcome.heads()
    lines = [
        f"# Head search of {settings.model}",
        "",
        f"**Layers {format_layers(outcome.layers)} read {outcome.density:.1%} of dense attention's keys.** "
        f"{answers_line(outcome)}",
        "",
        f"- Budget: {spread} {budget.share:.0%} of dense attention's keys, by the kernels' own index; score: "
        f"{outcome.score}; of equal candidates (a layer's heads together within {outcome.tolerance}) the cheapest.",
        f"- Prompts: {'; '.join(source.prompts)}; hash {settings.prompts}; their last {settings.last_n} rows stay dense"
        f"{'' if settings.chunk is None else f'; in chunks of {settings.chunk} tokens'}.",
        f"- {source.environment['device']}; {versions}; {settings.dtype}.",
        f"- Repeat: `{source.command}`",
        "",
    ]
    poor = poor_heads(outcome)
    if poor:
        lines += [
            f"**{len(poor)} heads lose more than {POOR:.0%}** with the best candidate that they can afford: give them "
            "a larger budget, or other candidates.",
            "",
        ]
    if outcome.unweighted:
        lines += [
            f"Layers {format_layers(outcome.unweighted)} have no plain output projection: their errors are of the "
            "heads' outputs themselves.",
            "",
        ]
    lines += ["![patterns](patterns.png)", "", "![costs](costs.png)", "", *_candidate_table(outcome, heads), ""]
    lines += [*_layer_table(outcome), "", *_worst_table(outcome, heads), ""]
    return "\n".join(lines)


def _candidate_table(outcome: Outcome, heads: list[Head]) -> list[str]:
    """A row a candidate: what it costs and loses on all heads, and how many chose it."""
    chosen = Counter(head.candidate for head in heads)
    lines = [
        "## Candidates",
        "",
        "| candidate | block | keys read, of dense | mean error | mean recall | heads |",
        "|---|---|---|---|---|---|",
    ]
    for index, pattern in enumerate(outcome.candidates):
        means = [
            statistics.fmean(row[index] for layer in outcome.layers.values() for row in getattr(layer.measured, name))
            for name in ("density", "error", "recall")
        ]
        cells = f"{means[0]:.1%} | {means[1]:.4f} | {means[2]:.4f} | {chosen[index]}"
        lines.append(f"| {name_of(pattern)} | {pattern.block_size} | {cells} |")
    return lines


def _layer_table(outcome: Outcome) -> list[str]:
    """A row a layer: what its choice costs and loses."""
    lines = [
        "## Layers",
        "",
        "Error: of the layer's output, if its heads' errors are independent.",
        "",
        "| layer | keys read, of dense | error | mean recall | heads |",
        "|---|---|---|---|---|",
    ]
    for layer, entry in outcome.layers.items():
        counts = Counter(name_of(outcome.candidates[index]) for index in entry.chosen)
        heads = ", ".join(f"{count} {name}" for name, count in counts.most_common())
        figures = f"{entry.mean('density'):.1%} | {entry.error:.4f} | {entry.mean('recall'):.4f}"
        lines.append(f"| {layer} | {figures} | {heads} |")
    return lines


def _worst_table(outcome: Outcome, heads: list[Head]) -> list[str]:
    """The heads that lose most."""
    lines = [
        "## Heads that lose most",
        "",
        "| layer | head | candidate | loss | of its own output | recall | keys read, of dense |",
        "|---|---|---|---|---|---|---|",
    ]
    for layer, head, index, loss, density in sorted(heads, key=lambda entry: -entry.loss)[:_WORST]:
        measured = outcome.layers[layer].measured
        figures = f"{loss:.4f} | {measured.own_error[head][index]:.4f} | {measured.recall[head][index]:.4f}"
        lines.append(f"| {layer} | {head} | {name_of(outcome.candidates[index])} | {figures} | {density:.1%} |")
    return lines
