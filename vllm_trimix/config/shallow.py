"""The ``shallow`` entry: a dynamic pattern in the layers that the triangle leaves dense.

Users write ``{"pattern": NAME, ...its parameters}`` or ``{"heads": FILE}``; ``resolve_shallow`` makes of it what every
process obeys. Nothing here knows vLLM, and PyTorch is imported only where there is an entry.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_trimix.config.layers import check_size, format_layers, parse_layers
from vllm_trimix.untrusted import MAX_TOKENS, check_object, quoted

if TYPE_CHECKING:
    from vllm_trimix.patterns.base import DynamicPattern

# Where TriangleMix + MInference overtakes TriangleMix in the published table, on an A100: between 48K and 64K. On
# CUDA nothing is measured here; `vllm-trimix calibrate` finds a machine's own.
DEFAULT_MIN_SEQ_LEN = 65536
# The shortest prompts measured with the compiled CPU kernel (benchmarks/results/2026-11-21-cpu-dynamic), where both
# patterns measured gained; a test compares them.
COMPILED_CPU_MIN_SEQ_LEN = 8192


class ShallowConfig(BaseModel):
    """What users write besides the pattern's own parameters.

    Attributes:
        pattern: A pattern's name; its parameters stand beside it.
        heads: A head file instead: MInference's JSON, or what ``vllm-trimix search`` writes.
        layers: Layers that use it; unset: all outside the triangle set.
        last_n: The prompt's last rows, which stay dense; unset: as the triangle's.
        min_seq_len: Chunks of a prompt that end at fewer tokens stay dense; unset: by the machine.
    """

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)

    pattern: str | None = None
    heads: str | None = Field(default=None, min_length=1)
    layers: str | list[int | str] | None = None
    last_n: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    min_seq_len: int | None = Field(default=None, ge=0, le=MAX_TOKENS)


class Shallow(BaseModel):
    """What runs: complete, validated, plain JSON.

    Attributes:
        layers: Layers, global indices, ascending.
        patterns: Different patterns, as ``make_pattern`` reads them.
        heads: For each layer in turn, the number of each query head's pattern; empty: all have the only one.
        last_n: The prompt's last rows, which stay dense.
        min_seq_len: Chunks of a prompt that end at fewer tokens stay dense.
        source: ``config`` or the head file's name.
        notes: What runs instead of what a head file says, a line each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[int, ...]
    patterns: tuple[dict[str, Any], ...]
    heads: tuple[tuple[int, ...], ...] = ()
    last_n: int
    min_seq_len: int
    source: str
    notes: tuple[str, ...] = ()

    def heads_of(self, layer: int, first: int, num_heads: int) -> tuple[DynamicPattern, ...]:
        """The patterns of a layer's query heads ``[first, first + num_heads)``, numbered over all devices."""
        if not self.heads:
            return (self._made[0],) * num_heads
        numbers = self.heads[self.layers.index(layer)][first : first + num_heads]
        return tuple(self._made[number] for number in numbers)

    @cached_property
    def _made(self) -> list[DynamicPattern]:
        # Heavy: PyTorch.
        from vllm_trimix.patterns.registry import make_pattern

        return [make_pattern(entry, where="trimix.shallow") for entry in self.patterns]

    @property
    def label(self) -> str:
        """The patterns in a word, for the log."""
        return "+".join(sorted({entry["pattern"] for entry in self.patterns}))

    @property
    def dense_len(self) -> int:
        """The longest prompt of which no row is sparse, whatever ``min_seq_len`` is, in tokens."""
        return self.last_n + self.largest_block - 1

    @property
    def largest_block(self) -> int:
        """Rows of the largest tile."""
        return max(pattern.block_size for pattern in self._made)


def merged_shallow(own: Any, below: Any) -> Any:
    """An entry over that of the preset it builds on: one without a pattern of its own changes keys of the other's.

    A pattern's parameters mean nothing to another pattern: an entry that names one, or a head file, stands alone.
    """
    if own is None:
        return below
    if isinstance(own, dict) and isinstance(below, dict) and not {"pattern", "heads"} & own.keys():
        return {**below, **own}
    return own


def resolve_shallow(
    raw: object,
    *,
    triangle_layers: Collection[int],
    num_layers: int,
    num_heads: int | None,
    last_n: int,
    min_seq_len: int = DEFAULT_MIN_SEQ_LEN,
) -> Shallow | None:
    """Validates the user's ``shallow`` entry.

    Args:
        raw: The entry; None or ``"dense"`` when there is none.
        triangle_layers: Layers of the triangle set.
        num_layers: Layers of the model.
        num_heads: Query heads of a layer; None where a head file can't be used.
        last_n: The triangle's, the default.
        min_seq_len: The default on this machine.

    Raises:
        ValueError: Naming the key, its value, the limit and the fix.
    """
    if raw is None or raw == "dense":
        return None
    where = "trimix.shallow"
    if not isinstance(raw, dict):
        raise ValueError(f'{where}: expected an object such as {{"pattern": "flexprefill"}}, got {quoted(raw)}')
    check_object(raw, where)
    check_size(raw.get("layers"), where=f"{where}.layers")
    try:
        config = ShallowConfig.model_validate(raw)
    except ValidationError as error:
        wrong = {str(item["loc"][0]): item for item in error.errors()}
        raise ValueError(
            "; ".join(f"{where}.{key}: {quoted(raw[key])} is not valid: {item['msg']}" for key, item in wrong.items())
        ) from None
    layers = _layers(config, triangle_layers, num_layers, where)
    own = {key: value for key, value in raw.items() if key not in ShallowConfig.model_fields}
    found = _patterns(config, own, layers, num_layers, num_heads, where)
    meant = min_seq_len if found.min_seq_len is None else found.min_seq_len
    return Shallow(
        layers=layers,
        patterns=found.patterns,
        heads=found.heads,
        last_n=last_n if config.last_n is None else config.last_n,
        min_seq_len=meant if config.min_seq_len is None else config.min_seq_len,
        source=found.source,
        notes=found.notes,
    )


class _Found(NamedTuple):
    """What ``Shallow`` has of an entry or its head file."""

    patterns: tuple[dict[str, Any], ...]
    heads: tuple[tuple[int, ...], ...] = ()
    source: str = "config"
    notes: tuple[str, ...] = ()
    min_seq_len: int | None = None


def _layers(config: ShallowConfig, triangle_layers: Collection[int], num_layers: int, where: str) -> tuple[int, ...]:
    layers = tuple(layer for layer in range(num_layers) if layer not in triangle_layers)
    if config.layers is not None:
        layers = parse_layers(config.layers, num_layers=num_layers, where=f"{where}.layers")
        both = sorted(set(layers) & set(triangle_layers))
        if both:
            raise ValueError(
                f"{where}.layers: {format_layers(both)} are triangle layers as well; a layer has one pattern: "
                f"take them out here or out of trimix.layers ({format_layers(triangle_layers)})"
            )
    if not layers:
        raise ValueError(
            f"{where}: no layer is left for it: all {num_layers} are triangle layers, or its own list is empty; "
            'remove it, or give it "layers"'
        )
    return layers


def _patterns(
    config: ShallowConfig,
    own: dict[str, Any],
    layers: tuple[int, ...],
    num_layers: int,
    num_heads: int | None,
    where: str,
) -> _Found:
    # Heavy: PyTorch.
    from vllm_trimix.patterns.registry import PATTERNS, describe, make_pattern

    if (config.pattern is None) == (config.heads is None):
        raise ValueError(
            f'{where}: write either "pattern" ({", ".join(PATTERNS)}) or "heads" with a head file; '
            f"got {'neither' if config.pattern is None else 'both'}"
        )
    if config.heads is None:
        beside = tuple(ShallowConfig.model_fields)
        pattern = make_pattern({"pattern": config.pattern, **own}, where=where, beside=beside)
        return _Found((describe(pattern),))
    if own:
        raise ValueError(f"{where}: {quoted(list(own))} can't stand beside heads: the file has each head's parameters")
    if num_heads is None:
        raise ValueError(f"{where}.heads: head files need the model's number of heads, which is not known here")
    # Heavy: PyTorch.
    from vllm_trimix.config.head_files import check_head_file, read_head_file

    file = read_head_file(config.heads, where=f"{where}.heads")
    check_head_file(file, num_layers=num_layers, num_heads=num_heads, layers=layers, where=f"{where}.heads")
    numbers: dict[DynamicPattern, int] = {}
    heads = []
    for layer in layers:
        entry = file.layers[layer]
        assert entry is not None
        heads.append(tuple(numbers.setdefault(pattern, len(numbers)) for pattern in entry))
    patterns = tuple(describe(pattern) for pattern in numbers)
    return _Found(patterns, tuple(heads), Path(config.heads).name, file.notes, file.min_seq_len)
