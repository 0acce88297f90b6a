"""Layer sets as people write them."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from vllm_trimix.untrusted import quoted

MAX_ITEMS = 10_000
"""Of a list; no model has that many layers, and a hostile one is not worth reading."""

_MAX_DIGITS = 9


def parse_layers(spec: str | Iterable[int | str], *, num_layers: int, where: str = "trimix.layers") -> tuple[int, ...]:
    """Expands a layer list into ascending global indices.

    Args:
        spec: ``"5,7,10,15-35"``, or a list of such items and integers. Empty means no layer.
        num_layers: Layers of the model.
        where: The setting, for errors.

    Raises:
        ValueError: A malformed item, an inverted range, or an index outside the model.
    """
    items = spec.split(",", MAX_ITEMS) if isinstance(spec, str) else list(spec)
    check_size(items, where=where)
    if items == [""]:
        items = []
    layers: set[int] = set()
    for item in items:
        text = item.strip() if isinstance(item, str) else quoted(item)
        first, dash, last = text.partition("-")
        if isinstance(item, bool) or not _is_number(first) or (dash and not _is_number(last)):
            raise ValueError(
                f"{where}: {quoted(text)} in {quoted(spec)} is not a layer or a range; "
                'write e.g. "16-31" or "5,7,10,15-35"'
            )
        low, high = int(first), int(last or first)
        if high < low:
            raise ValueError(f"{where}: range {quoted(text)} runs backwards; write '{high}-{low}'")
        if high >= num_layers:
            bad = low if low >= num_layers else high
            raise ValueError(f"{where}: '{bad}' is outside this model's {num_layers} layers (0-{num_layers - 1})")
        layers.update(range(low, high + 1))
    return tuple(sorted(layers))


def check_size(items: object, *, where: str) -> None:
    """Refuses a list that nobody should spend time on.

    Raises:
        ValueError: More than ``MAX_ITEMS`` items.
    """
    if isinstance(items, list) and len(items) > MAX_ITEMS:
        raise ValueError(f"{where}: {quoted(items)} lists more than {MAX_ITEMS} layers, the limit; write ranges")


def _is_number(text: str) -> bool:
    """Whether it is a whole number in plain digits, and short enough to be a layer's."""
    return text.isascii() and text.isdecimal() and len(text) <= _MAX_DIGITS


def format_layers(layers: Collection[int]) -> str:
    """The shortest spelling of a layer set, e.g. ``5,7,10,15-35``; ``none`` when empty."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "none"
