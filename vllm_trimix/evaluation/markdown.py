"""The report of an evaluation as Markdown: the worst first, then every cell, then the ablations."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vllm_trimix.evaluation.cells import SOLVED, Result, overall
from vllm_trimix.evaluation.configurations import STOCK, Configuration
from vllm_trimix.evaluation.outcome import Evaluation
from vllm_trimix.evaluation.sample import Measure
from vllm_trimix.evaluation.statistics import Difference


def markdown(evaluation: Evaluation, pictures: Sequence[str]) -> str:
    """The report."""
    hardware = evaluation.environment.get("hardware", "unknown hardware")
    versions = evaluation.environment.get("versions", {})
    named = ", ".join(f"{name} {value}" for name, value in versions.items())
    lines = [
        f"# Evaluation of {evaluation.model}: {evaluation.suite}",
        "",
        f"- {hardware}; {named}; {datetime.date.today().isoformat()}.",
        f"- Prompts {evaluation.prompts}: {evaluation.settings['samples']} of each task and length, seed "
        f"{evaluation.settings['seed']}; {evaluation.settings['asked']}{_turns(evaluation.settings)}.",
        "- Differences are to stock vLLM on the same prompts, with their 95% interval (Bonett and Price; Student's for "
        "perplexity). `none seen` is no proof of none: the interval says what is still possible.",
        f"- Times are medians, {evaluation.settings['concurrency']} request(s) at a time; configurations ran one after "
        "the other, so ratios of times show the order of magnitude only.",
        f"- Repeat: `{evaluation.command}`",
        "",
    ]
    for configuration in evaluation.configurations:
        lines.append(f"- `{configuration.name}`: {_what(configuration, evaluation.facts.get(configuration.name))}")
    lines += ["", *warnings(evaluation)]
    lines += [line for name in pictures for line in (f"![{Path(name).stem}]({name})", "")]
    for configuration in evaluation.configurations:
        if configuration.name != STOCK and not configuration.ablation:
            lines += _tables(evaluation, configuration)
    lines += _ablations(evaluation)
    return "\n".join(lines)


def _what(configuration: Configuration, facts: dict[str, Any] | None) -> str:
    if configuration.flags:
        return f"stock vLLM again with `{' '.join(configuration.flags)}`: what two runs of it differ by"
    if configuration.entry is None:
        return "stock vLLM, the plugin not loaded" if not (facts or {}).get("server") else "requests opted out"
    if facts and facts.get("start_line"):
        return f"`{facts['start_line']}`"
    if facts and facts.get("server"):
        return f"as the server at {facts['server']} runs it"
    return f"`{json.dumps(configuration.entry)}`"


def warnings(evaluation: Evaluation) -> list[str]:
    lines = []
    for task, why in evaluation.unavailable.items():
        lines.append(f"**{task} was left out**: {why}")
    for name, why in evaluation.failures.items():
        lines.append(f"**{name} was given up**: {why}")
    lines += evaluation.notes
    failed = evaluation.failed
    if failed:
        lines.append(f"**{len(failed)} prompts have no answer** and are left out of both sides:")
        lines += [f"`{a.configuration}` {a.sample}: {a.error}" for a in failed[:20]]
        lines += [f"... and {len(failed) - 20} more, in `result.json`"] if len(failed) > 20 else []
    unsolved = [
        f"{r.task} at {r.length}"
        for r in evaluation.of(STOCK)
        if r.measure == Measure.ANSWER and r.score is not None and r.score < SOLVED
    ]
    if unsolved:
        lines.append(
            f"**Stock itself rarely solves** {', '.join(unsolved)}: what it can't do can't get lost; they say little."
        )
    own = sorted({r.task for r in evaluation.of(STOCK) if not r.comparable and r.measure == Measure.ANSWER})
    if own:
        sources = sorted({r.source for r in evaluation.of(STOCK) if not r.comparable})
        lines.append(
            f"Not comparable with published scores, only with each other: {', '.join(own)} ({'; '.join(sources)})."
        )
    if any(r.measure == Measure.PERPLEXITY for r in evaluation.results):
        lines.append(
            "**Perplexity scores every prompt row**, and the mask takes keys from all of them but the last: it loses "
            "here even where answers, which only the last rows give, lose nothing."
        )
    dense = [
        f"{r.task} at {r.length} under `{r.configuration}`"
        for r in evaluation.results
        if r.sparse is not None and r.sparse == 0
    ]
    if dense:
        shown = ", ".join(dense[:6]) + (f" and {len(dense) - 6} more" if len(dense) > 6 else "")
        lines.append(f"Too short for any sparse row, dense throughout: {shown}.")
    return [line for text in lines for line in (text, "")]


def _tables(evaluation: Evaluation, configuration: Configuration) -> list[str]:
    found = evaluation.of(configuration.name)
    if not found:
        return []
    stock = {(r.task, r.length): r for r in evaluation.of(STOCK)}
    lines = [f"## {configuration.name}", ""]
    answered = [r for r in found if r.measure == Measure.ANSWER and r.difference is not None]
    if answered:
        lines += [_summary(answered), ""]
    columns = ["task", "tokens", "n", "stock", configuration.name, "difference (95%)", "verdict"]
    agreement = any(r.kl is not None for r in found)
    columns += ["KL first token", "KL"] if agreement else []
    timed = any(r.seconds for r in found)
    columns += ["TTFT stock (s)", "TTFT (s)", "ratio"] if timed else []
    lines += [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for length in dict.fromkeys(r.length for r in found):
        for result in found:
            if result.length == length:
                lines.append(_row(result, stock.get((result.task, length)), agreement=agreement, timed=timed))
        mean = overall(evaluation.results, evaluation.answers, configuration.name, length)
        if mean is not None:
            dense, mine, by = mean
            cells = ["*mean of tasks*", str(length), "", points(dense), points(mine), interval(by), by.verdict]
            lines.append(f"| {' | '.join(cells + [''] * (len(columns) - len(cells)))} |")
    return [*lines, "", *_by_place(found, stock)]


def _by_place(found: Sequence[Result], stock: dict[tuple[str, int], Result]) -> list[str]:
    """Where answers part from stock's, and how much of them is repeated."""
    kept = [r for r in found if r.agrees]
    if not kept:
        return []
    places = sorted({place for r in kept for place in r.agrees}, key=int)
    columns = ["task", "tokens", *(f"first {place}" for place in places), "repeated, stock", "repeated"]
    lines = [
        "Share of the answers whose first tokens are stock's, and share of the runs of four tokens that stood in the "
        "answer before (%).",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for result in kept:
        repeated = [r.repeated if r else None for r in (stock.get((result.task, result.length)), result)]
        shares = [*(result.agrees.get(place) for place in places), *repeated]
        cells = ["" if share is None else points(share) for share in shares]
        lines.append(f"| {' | '.join([result.task, str(result.length), *cells])} |")
    return [*lines, ""]


def _turns(settings: Mapping[str, Any]) -> str:
    """How they are put, where that isn't the published way."""
    arguments, room = settings.get("chat_template_kwargs"), settings.get("max_answer_tokens")
    words = "; as a user's turn of the chat template" if settings.get("chat_template") else ""
    words += f" with `{json.dumps(arguments)}`" if arguments else ""
    return words + (f"; up to {room} tokens an answer" if room else "")


def _summary(answered: Sequence[Result]) -> str:
    """The worst first: an average hides it."""
    worst = min(answered, key=lambda r: r.difference.mean if r.difference else 0.0)
    losses = [r for r in answered if r.difference and r.difference.verdict == "loss"]
    gains = [r for r in answered if r.difference and r.difference.verdict == "gain"]
    assert worst.difference is not None
    widest = max((r.difference.high - r.difference.low) / 2 for r in answered if r.difference)
    return (
        f"Worst: {worst.task} at {worst.length} tokens, {interval(worst.difference)} points. Losses beyond chance in "
        f"{len(losses)} of {len(answered)} cells, gains in {len(gains)}; the widest interval reaches "
        f"{100 * widest:.1f} points to either side."
    )


def _row(result: Result, stock: Result | None, *, agreement: bool, timed: bool) -> str:
    perplexity = result.measure == Measure.PERPLEXITY
    score = nats if perplexity else points
    by = result.difference
    cells = [
        result.task,
        str(result.length),
        str(result.n),
        score(result.baseline) if result.baseline is not None else "",
        score(result.score) if result.score is not None else "",
        "" if by is None else (nats_interval(by) if perplexity else interval(by)),
        "" if by is None else by.verdict,
    ]
    if agreement:
        cells += ["" if value is None else f"{value:.4f}" for value in (result.kl_first, result.kl)]
    if timed:
        cells += [
            f"{stock.seconds:.3g}" if stock and stock.seconds else "",
            f"{result.seconds:.3g}" if result.seconds else "",
            f"{result.ratio:.2f}" if result.ratio else "",
        ]
    return f"| {' | '.join(cells)} |"


def points(score: float) -> str:
    return f"{100 * score:.1f}"


def nats(score: float) -> str:
    return f"{score:.4f} ({math.exp(min(score, 50)):.4g})"


def interval(by: Difference) -> str:
    return f"{100 * by.mean:+.1f} ({100 * by.low:+.1f} to {100 * by.high:+.1f})"


def nats_interval(by: Difference) -> str:
    if not math.isfinite(by.low):
        return f"{by.mean:+.4f} (of one pair)"
    return f"{by.mean:+.4f} ({by.low:+.4f} to {by.high:+.4f})"


def _ablations(evaluation: Evaluation) -> list[str]:
    """A table an ablation: mean difference to stock by task, all lengths together."""
    lines: list[str] = []
    names = dict.fromkeys(c.ablation for c in evaluation.configurations if c.ablation)
    for ablation in names:
        mine = [c for c in evaluation.configurations if c.ablation == ablation]
        tasks = list(dict.fromkeys(r.task for c in mine for r in evaluation.of(c.name)))
        lines += [
            f"## Ablation: {ablation}",
            "",
            "Score, and its difference to stock in points (nats for perplexity), means over all lengths.",
            "",
            f"| {ablation} | {' | '.join(tasks)} | TTFT ratio |",
            "|---" * (len(tasks) + 2) + "|",
        ]
        for configuration in mine:
            found = evaluation.of(configuration.name)
            cells = [_mean_cell([r for r in found if r.task == task]) for task in tasks]
            ratios = [r.ratio for r in found if r.ratio]
            ratio = f"{sum(ratios) / len(ratios):.2f}" if ratios else ""
            lines.append(f"| {configuration.value} | {' | '.join(cells)} | {ratio} |")
        lines.append("")
    return lines


def _mean_cell(found: Sequence[Result]) -> str:
    scored = [r for r in found if r.score is not None and r.difference is not None]
    if not scored:
        return ""
    score = sum(r.score for r in scored if r.score is not None) / len(scored)
    change = sum(r.difference.mean for r in scored if r.difference is not None) / len(scored)
    if scored[0].measure == Measure.PERPLEXITY:
        return f"{score:.3f} ({change:+.3f})"
    return f"{100 * score:.1f} ({100 * change:+.1f})"
