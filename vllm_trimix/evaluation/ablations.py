"""Ablations: configurations that vary one thing of a base, as reviewers of sparse prefill ask for them."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_trimix.config.entry import Resolved
from vllm_trimix.config.layers import format_layers
from vllm_trimix.evaluation.configurations import Configuration

Entry = dict[str, Any]

DEFAULTS: dict[str, tuple[int, ...]] = {
    "last_n": (0, 16, 64, 128, 256),
    "n_init": (0, 4, 8, 64),
    "n_local": (64, 256, 512, 1024, 2048),
}
"""Values in tokens, around the published ones."""
SHAPES: dict[str, Entry] = {
    "triangle": {},
    "a_shape": {"last_n": 0},
    # A window of one key is the row itself: what is left is the dense last rows.
    "last_rows": {"n_init": 0, "n_local": 1},
    "window": {"n_init": 0, "last_n": 0},
}
"""The pattern's parts: sinks, window and last rows; without last rows; without sinks and window; the window alone."""
_NUM_RANDOM = 3


@dataclass(frozen=True)
class Base:
    """What is varied.

    Attributes:
        resolved: What the base's entry means for the model.
        able: Layers that can be triangle layers, ascending; the others stay stock in any set.
        order: Layers by importance, the least important first, for ``num_layers``; None for the deepest first.
        seed: Of random layers.
    """

    resolved: Resolved
    able: Sequence[int]
    order: Sequence[int] | None = None
    seed: int = 0


def configurations(asked: Sequence[str], entry: Entry, base: Base) -> list[Configuration]:
    """The configurations of ``--ablation NAME`` or ``--ablation NAME=VALUE,VALUE``.

    Args:
        asked: What to vary.
        entry: The base, as the user wrote it.
        base: What that means for the model.

    Raises:
        ValueError: An unknown ablation or a value that makes no sense.
    """
    found: list[Configuration] = []
    for text in asked:
        name, _, values = text.partition("=")
        if name not in ABLATIONS:
            raise ValueError(f"--ablation: {name!r} is not an ablation; there are {', '.join(ABLATIONS)}")
        if any(configuration.ablation == name for configuration in found):
            raise ValueError(f"--ablation: {name!r} is asked for twice; give its values with commas between")
        chosen = [value for value in values.split(",") if value] or None
        for value, changed in ABLATIONS[name](chosen, base):
            layers = {"layers", "starting_layer"} & changed.keys()
            kept = {key: old for key, old in entry.items() if not (layers and key in ("layers", "starting_layer"))}
            found.append(Configuration(f"{name}={value}", {**kept, **changed}, ablation=name, value=value))
    return found


def read_order(folder: Path) -> list[int]:
    """Layers by the importance that ``vllm-trimix probe`` found, the least important first.

    Raises:
        ValueError: No results of a probe.
        OSError: They can't be read.
    """
    path = folder / "scores.json"
    try:
        # The first ranking is the one that chose.
        order = next(iter(json.loads(path.read_text())["orders"].values()))
        return [int(layer) for layer in order]
    except (ValueError, TypeError, KeyError, AttributeError, StopIteration):
        raise ValueError(f"--probe: {path} holds no results of vllm-trimix probe") from None


_Variants = Iterator[tuple[str, Entry]]


def _tokens(key: str) -> Callable[[list[str] | None, Base], _Variants]:
    def variants(values: list[str] | None, _: Base) -> _Variants:
        for value in DEFAULTS[key] if values is None else _whole(key, values):
            yield str(value), {key: value}

    return variants


def _starting_layer(values: list[str] | None, base: Base) -> _Variants:
    num_layers = base.resolved.num_layers
    for first in range(0, num_layers, max(1, num_layers // 8)) if values is None else _whole("starting_layer", values):
        yield str(first), {"starting_layer": first}


def _num_layers(values: list[str] | None, base: Base) -> _Variants:
    ranked = [layer for layer in base.order if layer in base.able] if base.order is not None else [*base.able][::-1]
    step = max(1, len(ranked) // 8)
    for count in range(step, len(ranked) + 1, step) if values is None else _whole("num_layers", values):
        if count > len(ranked):
            raise ValueError(
                f"--ablation: num_layers={count} is more than the {len(ranked)} layers that can be triangle layers"
            )
        yield str(count), {"layers": format_layers(tuple(sorted(ranked[:count])))}


def _random_layers(values: list[str] | None, base: Base) -> _Variants:
    """Random sets as large as the base's: what a chosen set has to beat."""
    numbers = list(range(_NUM_RANDOM)) if values is None else _whole("random_layers", values)
    rng = random.Random(base.seed)
    chosen = tuple(layer for layer in base.resolved.layers if layer in base.able)
    drawn: list[tuple[int, ...]] = []
    for _ in range(100 * (max(numbers) + 1)):
        layers = tuple(sorted(rng.sample(base.able, len(chosen))))
        if layers not in (*drawn, chosen):
            drawn.append(layers)
    for number in numbers:
        if number >= len(drawn):
            raise ValueError(
                f"--ablation: random_layers={number}: of the {len(base.able)} layers that can be triangle layers there "
                f"are {len(drawn)} other sets of {len(chosen)}; ask fewer, or leave random_layers out"
            )
        yield str(number), {"layers": format_layers(drawn[number])}


def _shape(values: list[str] | None, _: Base) -> _Variants:
    for value in _known("shape", SHAPES, values):
        yield value, SHAPES[value]


def _static(values: list[str] | None, _: Base) -> _Variants:
    """Published baselines that use one fixed pattern in all layers: StreamingLLM's is the A-shape."""
    everywhere = {f"{name}_everywhere": {**keys, "starting_layer": 0} for name, keys in SHAPES.items()}
    for value in _known("static", everywhere, values):
        yield value, everywhere[value]


def _known(ablation: str, there: dict[str, Entry], values: list[str] | None) -> list[str]:
    unknown = [value for value in values or () if value not in there]
    if unknown:
        raise ValueError(f"--ablation: {ablation}={unknown[0]!r} is not known; there are {', '.join(there)}")
    return values or list(there)


def _whole(ablation: str, values: list[str]) -> list[int]:
    wrong = [value for value in values if not value.isdecimal()]
    if wrong:
        raise ValueError(f"--ablation: {ablation}={wrong[0]!r} is not a whole number; write e.g. {ablation}=0,128")
    return [int(value) for value in values]


ABLATIONS: dict[str, Callable[[list[str] | None, Base], _Variants]] = {
    "last_n": _tokens("last_n"),
    "n_init": _tokens("n_init"),
    "n_local": _tokens("n_local"),
    "starting_layer": _starting_layer,
    "num_layers": _num_layers,
    "shape": _shape,
    "random_layers": _random_layers,
    "static": _static,
}
