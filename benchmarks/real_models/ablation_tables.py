"""The tables of what was varied: layers, shape, last rows, window."""

from __future__ import annotations

import statistics

from benchmarks.real_models.plan import MODELS
from benchmarks.real_models.results import Kept
from benchmarks.real_models.written import NOTHING, Found, divergence, nats, points, table, title
from vllm_trimix.evaluation.configurations import TRIMIX
from vllm_trimix.evaluation.statistics import Difference
from vllm_trimix.patterns.triangle import Triangle

_BASE = {"last_n": Triangle.last_n, "n_local": Triangle.n_local, "shape": "triangle"}
_NO_LAST_ROWS = "last_n=0"
"""What makes an A-shape of a triangle; it isn't asked twice."""
_MEASURED = ("KL (95%)", "same 64 tokens (%)", "needle")


def layers(found: Found) -> str:
    """How many layers: divergence by number, of ranked layers and of random sets; the needle beside it."""
    kept = found.get("smollm2-layers")
    needles = found.get("smollm2-needle-ablation")
    by_needle = {} if needles is None else {c["configuration"]: c for c in needles.result["cells"]}
    rows = []
    for count, (ranked, drawn) in counts(kept).items() if kept is not None else ():
        cell = by_needle.get(f"num_layers={count}")
        rows.append(
            (
                str(count),
                nats(ranked),
                f"{statistics.median(drawn):.2g} ({min(drawn):.2g} to {max(drawn):.2g})" if drawn else "",
                "" if cell is None else f"{points(cell['baseline'])} to {points(cell['score'])}",
            )
        )
    first = table(("layers of 30", "KL, ranked (95%)", "KL, random sets (median, range)", "needle"), rows)
    return f"{first}\n\n{_gemma_sets(found)}"


def counts(kept: Kept) -> dict[int, tuple[Difference | None, list[float]]]:
    """By number of layers: the divergence of the ranked ones, and that of each random set."""
    length = min(cell["length"] for cell in kept.result["cells"])
    found: dict[int, tuple[Difference | None, list[float]]] = {}
    names = [name for name in kept.result["configurations"] if name.startswith(("num_layers=", "random-"))]
    for name in names:
        count = int(name.replace("=", "-").split("-")[1])
        by = divergence(kept, length, name)
        ranked, drawn = found.get(count, (None, []))
        if name.startswith("num_layers="):
            ranked = by
        elif by is not None:
            drawn = [*drawn, by.mean]
        found[count] = ranked, drawn
    return dict(sorted(found.items()))


def _gemma_sets(found: Found) -> str:
    kept, needles = found.get("gemma-shape"), found.get("gemma-needle-ablation")
    rows = []
    for name in () if kept is None else [n for n in kept.result["configurations"] if n.startswith("layers-")]:
        assert kept is not None
        rows.append((name.removeprefix("layers-").replace("-", ", "), *_measured(kept, needles, name)))
    if kept is not None and kept.of(TRIMIX):
        rows.append(("5, 11, 17", *_measured(kept, needles, TRIMIX)))
    return table(("layers of Gemma in triangle, of 5, 11, 17", *_MEASURED), rows)


def _measured(kept: Kept, needles: Kept | None, name: str) -> tuple[str, str, str]:
    """Divergence, agreement and needle of a configuration."""
    (length,) = {cell["length"] for cell in kept.result["cells"]}
    cell = next((c for c in kept.of(name) if c["length"] == length), None)
    other = next(iter(needles.of(name)), None) if needles is not None else None
    return (
        nats(divergence(kept, length, name)),
        points(cell["agrees"]["64"]) if cell is not None and "64" in cell.get("agrees", {}) else "",
        f"{points(other['baseline'])} to {points(other['score'])}" if other is not None and other["n"] else "",
    )


def shape(found: Found) -> str:
    """A row a value of what was varied, at the shortest length; the base among them."""
    texts = []
    for model in MODELS:
        kept, needles = found.get(f"{model.short}-shape"), found.get(f"{model.short}-needle-ablation")
        rows = []
        for ablation in ("shape", "last_n", "n_local", "random_layers"):
            for label, name in varied(kept, ablation) if kept is not None else ():
                assert kept is not None
                rows.append((ablation, label, *_measured(kept, needles, name)))
        if rows:
            heading = f"**{title(model)}** at {min(model.prefill)} tokens:"
            texts.append(f"{heading}\n\n{table(('varied', 'value', *_MEASURED), rows)}")
    return "\n\n".join(texts) or NOTHING


def varied(kept: Kept, ablation: str) -> list[tuple[str, str]]:
    """Values of an ablation and their configurations, ascending where they are numbers, the base's among them."""
    names = [name for name in kept.result["configurations"] if name.startswith(f"{ablation}=")]
    found = [(name.partition("=")[2], name) for name in names]
    if ablation == "shape" and _NO_LAST_ROWS in kept.result["configurations"]:
        found.append(("a_shape", _NO_LAST_ROWS))
    if found and ablation in _BASE and TRIMIX in kept.result["configurations"]:
        found.append((str(_BASE[ablation]), TRIMIX))
    if all(label.isdecimal() for label, _ in found):
        return sorted(found, key=lambda item: int(item[0]))
    return sorted(found, key=lambda item: item[1] != TRIMIX)
