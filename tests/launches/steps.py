"""What a step of the composed CUDA path does, layer by layer, and what of it isn't documented."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

# What takes no memory and launches nothing on a GPU.
_VIEWS = {"split", "view", "slice", "select", "alias", "transpose", "unsqueeze", "expand", "permute", "detach"}
# Of a dense remainder whose rows lie apart: its queries, keys and values are gathered, its outputs written back.
_GATHER, _SCATTER = "index", "index_put_"


@dataclass
class Layer:
    """One layer's forward.

    Attributes:
        kind: ``triangle``, ``dynamic``, ``warm-up`` or ``stock``.
        rows: How the dense remainder lies: ``none``, ``slice`` or ``gather``.
        events: ``dense`` and the kernels that were launched.
        operations: What this package's own code asked of torch.
        arrays: Addresses of the work items that were launched.
    """

    kind: str
    rows: str
    events: list[str] = field(default_factory=list)
    operations: Counter[str] = field(default_factory=Counter)
    arrays: set[int] = field(default_factory=set)


@dataclass
class Step:
    """One step of the runner.

    Attributes:
        uploads: Bytes of each.
        layers: Its layers.
        problems: What was out of place.
    """

    uploads: list[int] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def wrong(step: Step) -> Iterator[str]:
    """What a step did besides its documented work."""
    if len(step.uploads) > 2:
        yield f"{len(step.uploads)} uploads; one a plan"
    if len({array for layer in step.layers if layer.kind == "triangle" for array in layer.arrays}) > 1:
        yield "layers of one step read different work items"
    for layer in step.layers:
        what = f"{layer.kind} layer, dense rows {layer.rows}"
        launched = [event for event in layer.events if event != "dense"]
        dense = layer.events[: len(layer.events) - len(launched)]
        if layer.events != [*dense, *launched] and layer.kind != "warm-up":
            yield f"{what}: {layer.events}"
        if len(dense) != (layer.kind in ("stock", "warm-up") or layer.rows != "none"):
            yield f"{what}: {len(dense)} calls of the dense kernel"
        yield from (f"{what}: {line}" for line in _launches(layer, launched))
        if layer.kind in ("triangle", "stock"):
            yield from (f"{what}: {line}" for line in _operations(layer))


def _launches(layer: Layer, launched: list[str]) -> Iterator[str]:
    triangle, merge = "triangle_prefill_kernel", "merge_partials_kernel"
    allowed: dict[str, list[list[str]]] = {"triangle": [[triangle], [triangle, merge]], "stock": [[]]}
    if launched not in allowed.get(layer.kind, [launched]):
        yield f"launches {launched}"
    dynamic = {"estimate_kernel", "sparse_prefill_kernel"}
    if layer.kind == "dynamic" and not (launched and set(launched) <= dynamic and launched[-1] != "estimate_kernel"):
        yield f"launches {launched}"


def _operations(layer: Layer) -> Iterator[str]:
    """A triangle layer's own copies and allocations: none but those of a remainder whose rows lie apart."""
    own = {name: count for name, count in layer.operations.items() if name not in _VIEWS}
    # The part of the output, queries, keys and values; then the output again.
    if own != ({_GATHER: 4, _SCATTER: 1} if layer.rows == "gather" else {}):
        yield f"operations {own}"
