"""The tables of docs/is-it-lossless.md and of the README, from what is kept of the evaluation."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.real_models.ablation_tables import layers, shape
from benchmarks.real_models.pattern_tables import compared
from benchmarks.real_models.plan import MODELS, SOLVED, Model
from benchmarks.real_models.written import (
    NOTHING,
    Found,
    difference,
    divergence,
    interval,
    nats,
    points,
    table,
    task_cell,
    title,
)
from vllm_trimix.evaluation.configurations import NOISE_FLOOR, STOCK, TRIMIX
from vllm_trimix.evaluation.statistics import paired_difference

_SUITES = ("niah", "ruler", "retrieval")
_PLACES = ("16", "64", "128", "256", "512")


def parts(found: Found) -> dict[str, str]:
    """The page's generated parts by name."""
    return {
        "layers": layers(found),
        "tasks": tasks(found),
        "needle": needle(found),
        "documents": documents(found),
        "shape": shape(found),
        "long": long_answers(found),
        "perplexity": perplexity(found),
        "patterns": compared(found),
    }


def summary(found: Found) -> str:
    """The README's: a row a model and length, all tasks that stock solves together, and the worst."""
    rows = []
    for model in MODELS:
        chosen = chosen_layers(found, model)
        for length in sorted(model.prefill):
            cells = [cell for cell in solved(found, model) if cell["length"] == length]
            if cells:
                scores, dense = pairs(found, model, length)
                by = paired_difference(scores, dense)
                worst = min(cells, key=lambda cell: cell["difference"]["mean"])
                means = [100 * statistics.fmean(values) for values in (dense, scores)]
                rows.append(
                    (
                        f"{title(model)}, layers {chosen}",
                        str(len(cells)),
                        str(length),
                        str(len(scores)),
                        *(f"{mean:.1f}" for mean in means),
                        interval(by),
                        f"{worst['task']} {interval(difference(worst))}",
                    )
                )
    return table(("model", "tasks", "tokens", "prompts", "stock", "TRIMIX", "difference (95%)", "worst task"), rows)


def solved(found: Found, model: Model) -> list[dict[str, Any]]:
    """The results of the triangle where stock solves the task and both were asked."""
    cells = []
    for suite in _SUITES:
        kept = found.get(f"{model.short}-{suite}")
        cells += [] if kept is None else [c for c in kept.of(TRIMIX) if c["n"] and c["baseline"] >= SOLVED]
    return cells


def pairs(found: Found, model: Model, length: int) -> tuple[list[float], list[float]]:
    """Scores of the triangle and of stock on the same prompts, all solved tasks of a length together."""
    mine: list[float] = []
    dense: list[float] = []
    names = {cell["task"] for cell in solved(found, model) if cell["length"] == length}
    for suite in _SUITES:
        kept = found.get(f"{model.short}-{suite}")
        lines = [] if kept is None else [a for a in kept.answers if a["length"] == length and a["task"] in names]
        stock = {line["sample"]: line["score"] for line in lines if line["configuration"] == STOCK}
        both = [line for line in lines if line["configuration"] == TRIMIX and line["sample"] in stock]
        mine += [line["score"] for line in both]
        dense += [stock[line["sample"]] for line in both]
    return mine, dense


def chosen_layers(found: Found, model: Model) -> str:
    """The triangle layers that were evaluated, from the engine's own start line."""
    for name, kept in found.items():
        ran = kept.result["configurations"].get(TRIMIX, {}).get("start_line") or ""
        if name.startswith(f"{model.short}-") and ran:
            return str(ran.partition("layers=")[2].partition(" ")[0])
    return model.chosen


def tasks(found: Found) -> str:
    """A row a task, a column a length: stock, the triangle, and their difference."""
    texts = []
    for model in MODELS:
        at = {(cell["task"], cell["length"]): cell for cell in solved(found, model)}
        lengths = sorted({length for _, length in at})
        rows = [
            (task, *(task_cell(at.get((task, length))) for length in lengths))
            for task in dict.fromkeys(task for task, _ in at)
        ]
        heading = f"**{title(model)}**, layers {chosen_layers(found, model)} in triangle:"
        if rows:
            texts.append(f"{heading}\n\n{table(('task', *(f'{length} tokens' for length in lengths)), rows)}")
    return "\n\n".join(texts) or NOTHING


def needle(found: Found) -> str:
    """A row a model and length: the mean over all depths, and the depth that loses most."""
    rows = []
    for model in MODELS:
        kept = found.get(f"{model.short}-niah")
        for cell in [] if kept is None else kept.of(TRIMIX):
            dense = kept.cell(cell["task"], cell["length"], STOCK) if kept is not None else None
            if dense is None or not cell["n"]:
                continue
            lost = {depth: score - dense["depths"].get(depth, 0.0) for depth, score in cell["depths"].items()}
            worst = min(lost, key=lambda depth: lost[depth])
            rows.append(
                (
                    *(title(model), str(cell["length"]), str(cell["n"])),
                    *(points(cell["baseline"]), points(cell["score"]), interval(difference(cell))),
                    f"{100 * float(worst):.0f}% ({100 * lost[worst]:+.0f})" if lost[worst] < 0 else "none",
                )
            )
    return table(("model", "tokens", "prompts", "stock", "TRIMIX", "difference (95%)", "depth that loses most"), rows)


def documents(found: Found) -> str:
    """A row a model and length: divergence, noise floor, agreement."""
    rows = []
    for model in MODELS:
        kept = found.get(f"{model.short}-documents")
        for cell in [] if kept is None else kept.of(TRIMIX):
            assert kept is not None
            length = cell["length"]
            floor = kept.cell(cell["task"], length, NOISE_FLOOR)
            rows.append(
                (
                    *(title(model), str(length), str(cell["n"])),
                    nats(divergence(kept, length, TRIMIX)),
                    nats(divergence(kept, length, NOISE_FLOOR)),
                    *(points(cell["agrees"][place]) for place in ("1", "16", "64")),
                    points(floor["agrees"]["64"]) if floor is not None else "",
                )
            )
    columns = ("model", "tokens", "texts", "KL (95%)", "KL, noise floor", "same first token (%)", "same 16", "same 64")
    return table((*columns, "same 64, noise floor"), rows)


def long_answers(found: Found) -> str:
    """A row a task: agreement by position, form and repetition."""
    rows = []
    for model in MODELS:
        kept = found.get(f"{model.short}-long")
        for cell in [] if kept is None else kept.of(TRIMIX):
            assert kept is not None
            dense = kept.cell(cell["task"], cell["length"], STOCK)
            if dense is None or not cell["n"]:
                continue
            rows.append(
                (
                    *(title(model), cell["task"], str(cell["length"]), str(cell["n"])),
                    *(points(cell["agrees"][place]) if place in cell["agrees"] else "" for place in _PLACES),
                    f"{points(cell['baseline'])} to {points(cell['score'])}: {interval(difference(cell))}",
                    f"{points(dense['repeated'])} to {points(cell['repeated'])}",
                )
            )
    places = (f"same {place} (%)" for place in _PLACES)
    return table(("model", "task", "tokens", "prompts", *places, "form", "repeated (%)"), rows)


def perplexity(found: Found) -> str:
    """A row a model and length: nats a token."""
    rows = []
    for model in MODELS:
        kept = found.get(f"{model.short}-ppl")
        for cell in [] if kept is None else kept.of(TRIMIX):
            if cell["n"] > 1:
                by = difference(cell)
                rows.append(
                    (
                        *(title(model), str(cell["length"]), str(cell["n"])),
                        *(f"{cell['baseline']:.3f}", f"{cell['score']:.3f}"),
                        f"{-by.mean:+.4f} ({-by.high:+.4f} to {-by.low:+.4f})",
                    )
                )
    return table(("model", "tokens", "texts", "stock", "TRIMIX", "more nats a token (95%)"), rows)
