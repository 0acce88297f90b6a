"""Head files: a dynamic pattern for each query head of each layer, as JSON.

Two forms are read: files of MInference and Qwen, unchanged (``minference_heads.py``), and our own, which can hold every
pattern and says where it comes from. Only JSON, only numbers and names: reading a file runs nothing that it holds.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from vllm_trimix.config import minference_heads
from vllm_trimix.config.minference_heads import short
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.registry import PATTERNS, describe, make_pattern
from vllm_trimix.untrusted import plain_object, quoted, read_json

FORMAT = "vllm-trimix-heads/1"

MAX_BYTES = 64 * 2**20
"""A file of 128 layers of 128 heads has less than two million."""


@dataclass(frozen=True)
class HeadFile:
    """What a head file says.

    Attributes:
        layers: For each layer of the model a pattern for each query head; None: the file leaves the layer out.
        source: The form it was written in.
        model: The model that it is for, where the file says so.
        provenance: Where it comes from, as the file says.
        notes: What runs instead of what the file says, a line each.
        min_seq_len: Prompts from which on it is meant, where the file says so, in tokens.
    """

    layers: tuple[tuple[DynamicPattern, ...] | None, ...]
    source: Literal["minference", "vllm-trimix"]
    model: str | None = None
    provenance: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    min_seq_len: int | None = None


def read_head_file(path: str | Path, *, where: str) -> HeadFile:
    """Reads either form.

    Args:
        path: The file.
        where: The setting that names it, for errors.

    Raises:
        ValueError: Unreadable, too large, no JSON, or naming the layer, the head, the bad value and the limit.
    """
    label = f"{where}: head file {quoted(str(path))}"
    data = read_json(Path(path), label, max_bytes=MAX_BYTES)
    if isinstance(data, list):
        qwen = Path(path).name == f"{minference_heads.SPARSE_CONFIG}.json"
        return _others(minference_heads.read_list(list(_some(data, label)), label, qwen=qwen))
    if isinstance(data, dict):
        part = None if "format" in data else minference_heads.sparse_config(data)
        if part is not None:
            return _others(minference_heads.read_sparse_config(part, label))
        return _own(data, label)
    raise ValueError(
        f"{label}: holds {short(data)}; expected MInference's list with an object a layer, or an object with "
        f'"format": "{FORMAT}"'
    )


def _others(heads: minference_heads.Heads) -> HeadFile:
    return HeadFile(heads.layers, "minference", notes=heads.notes, min_seq_len=heads.min_seq_len)


def check_head_file(file: HeadFile, *, num_layers: int, num_heads: int, layers: Collection[int], where: str) -> None:
    """Checks that a file fits a model.

    Args:
        file: The file.
        num_layers: Layers of the model.
        num_heads: Query heads of a layer, over all devices.
        layers: The layers that will use it.
        where: The setting that names it, for errors.

    Raises:
        ValueError: Another number of layers or heads than the model's, or a layer that the file leaves out.
    """
    if len(file.layers) != num_layers:
        raise ValueError(
            f"{where}: the head file is for {len(file.layers)} layers, this model has {num_layers}; "
            f"take one that was made for this model{_made_for(file)}"
        )
    for layer in sorted(layers):
        if not 0 <= layer < num_layers:
            raise ValueError(f"{where}: layer {layer} is outside this model's {num_layers} layers (0-{num_layers - 1})")
        heads = file.layers[layer]
        if heads is None:
            raise ValueError(
                f"{where}: the head file leaves layer {layer} out; add its {num_heads} heads, or take the layer out "
                f"of those that use the file"
            )
        if len(heads) != num_heads:
            raise ValueError(
                f"{where}: layer {layer} of the head file has {len(heads)} heads (0-{len(heads) - 1}), this model has "
                f"{num_heads} query heads a layer; take a file that was made for this model{_made_for(file)}"
            )


def write_head_file(
    path: str | Path,
    layers: Sequence[Sequence[DynamicPattern] | None],
    *,
    model: str | None,
    provenance: Mapping[str, Any],
) -> None:
    """Writes our own form, a line for each head; ``read_head_file`` gives the same back.

    Args:
        path: The file, replaced where it exists.
        layers: As ``HeadFile.layers``.
        model: The model that it is for.
        provenance: Where it comes from; plain JSON.

    Raises:
        ValueError: Heads of a layer with several block sizes, no layer, a layer without heads, or a provenance that
            is no JSON.
        OSError: The file can't be written.
    """
    label = f"head file {str(path)!r}"
    for number, heads in enumerate(_some(layers, label)):
        if heads is not None:
            _check_layer(heads, label, number)
    head = {"format": FORMAT, "model": model, "provenance": dict(provenance)}
    try:
        text = json.dumps(head, indent=1, allow_nan=False)
        if json.loads(text, object_pairs_hook=plain_object) != head:
            raise ValueError("is not plain JSON: only strings as keys, no tuples")
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{label}: model and provenance: {error}") from None
    rows = ["null" if heads is None else f"[\n{_lines(heads)}\n]" for heads in layers]
    body = ",\n".join(rows)
    Path(path).write_text(f'{text.removesuffix("}").rstrip()},\n "layers": [\n{body}\n]\n}}\n')


def _lines(heads: Sequence[DynamicPattern]) -> str:
    return ",\n".join(f" {json.dumps(describe(pattern), allow_nan=False)}" for pattern in heads)


def _some(layers: Sequence[Any], label: str) -> Sequence[Any]:
    if not layers:
        raise ValueError(f"{label}: has no layers; expected one entry for each layer of the model")
    return layers


def _own(data: dict[str, Any], label: str) -> HeadFile:
    valid = ("format", "model", "provenance", "layers")
    for key in data:
        if key not in valid:
            near = difflib.get_close_matches(key[:100], valid, n=1)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"{label}: unknown key {short(key)}{hint} (valid: {', '.join(valid)})")
    if data.get("format") != FORMAT:
        raise ValueError(f'{label}: format: {short(data.get("format"))} is not one that this version reads: "{FORMAT}"')
    model, provenance, layers = data.get("model"), data.get("provenance", {}), data.get("layers")
    if not isinstance(model, str | None):
        raise ValueError(f"{label}: model: {short(model)} is not valid: should be a name or null")
    if not isinstance(provenance, dict):
        raise ValueError(f"{label}: provenance: {short(provenance)} is not valid: should be an object")
    if not isinstance(layers, list):
        raise ValueError(f"{label}: layers: {short(layers)} is not valid: should be a list with an entry a layer")
    made = (_own_layer(entry, label, layer) for layer, entry in enumerate(_some(layers, label)))
    return HeadFile(tuple(made), "vllm-trimix", model, provenance)


def _own_layer(entry: Any, label: str, layer: int) -> tuple[DynamicPattern, ...] | None:
    if entry is None:
        return None
    where = f"{label}: layer {layer}"
    if not isinstance(entry, list):
        raise ValueError(f"{where}: holds {short(entry)}; expected a list with an object a query head, or null")
    for head, item in enumerate(entry):
        if not isinstance(item, dict):
            raise ValueError(
                f'{where}, head {head}: holds {short(item)}; expected an object such as {{"pattern": "a_shape"}}'
            )
    heads = tuple(make_pattern(item, where=f"{where}, head {head}") for head, item in enumerate(entry))
    _check_layer(heads, label, layer)
    return heads


def _check_layer(heads: Sequence[DynamicPattern], label: str, layer: int) -> None:
    """Heads of a layer are computed together, in tiles of one size."""
    if not heads:
        raise ValueError(f"{label}: layer {layer}: has no heads; leave it out with null")
    for head, pattern in enumerate(heads):
        if type(pattern) not in PATTERNS.values():
            raise ValueError(f"{label}: layer {layer}, head {head}: {pattern!r} is not a pattern")
        if pattern.block_size != heads[0].block_size:
            raise ValueError(
                f"{label}: layer {layer}, head {head}: block_size {pattern.block_size} differs from head 0's "
                f"{heads[0].block_size}; all heads of a layer need the same (defaults differ: name it)"
            )


def _made_for(file: HeadFile) -> str:
    return f" (it says {short(file.model)})" if file.model is not None else ""
