"""Layer sets as people write them."""

from __future__ import annotations

from collections.abc import Collection, Iterable


def parse_layers(spec: str | Iterable[int | str], *, num_layers: int, where: str = "trimix.layers") -> tuple[int, ...]:
    """Expands a layer list into ascending global indices.

    Args:
        spec: ``"5,7,10,15-35"``, or a list of such items and integers. Empty means no layer.
        num_layers: Layers of the model.
        where: The setting, for errors.

    Raises:
        ValueError: A malformed item, an inverted range, or an index outside the model.
    """
    items = spec.split(",") if isinstance(spec, str) else list(spec)
    if items == [""]:
        items = []
    layers: set[int] = set()
    for item in items:
        text = str(item).strip()
        first, dash, last = text.partition("-")
        if isinstance(item, bool) or not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(
                f'{where}: {text!r} in {spec!r} is not a layer or a range; write e.g. "16-31" or "5,7,10,15-35"'
            )
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f"{where}: range {text!r} runs backwards; write '{high}-{low}'")
        if high >= num_layers:
            bad = low if low >= num_layers else high
            raise ValueError(f"{where}: '{bad}' is outside this model's {num_layers} layers (0-{num_layers - 1})")
        layers.update(range(low, high + 1))
    return tuple(sorted(layers))


def format_layers(layers: Collection[int]) -> str:
    """The shortest spelling of a layer set, e.g. ``5,7,10,15-35``; ``none`` when empty."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
