"""Head files that others wrote: MInference's list, its training branch's heads, and Qwen's sparse configuration.

A head is ``[type, vertical, slash, score]``. Where the code that a file was made for takes other numbers than the file
says, so does this, and says so in a note.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, NamedTuple

from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.registry import make_pattern

SPARSE_CONFIG = "sparse_attention_config"
"""Under which Qwen's models for a million tokens keep such a list, or in the file of this name."""

_DUAL_CHUNK = "dual_chunk_attention_config"
_THRESHOLD = "sparse_attention_threshold"

# What MInference's code raises smaller numbers of a vertical-slash head to.
_LEAST_VERTICAL, _LEAST_SLASH = 30, 50
# What Qwen's adds to the smallest vertical.
_SMALLEST, _ADDED = 30, 100
_BLOCKS = 100
_TYPES = ("vertical_and_slash", "stream_llm", "block_sparse", "dense", "flex_vertical_and_slash")
_FLEX = "flex_vertical_and_slash"


class Heads(NamedTuple):
    """What such a file says.

    Attributes:
        layers: For each layer a pattern for each head, or None.
        notes: What else than the file says is taken, a line each.
        min_seq_len: Prompts from which on it is meant, where the file says so.
    """

    layers: tuple[tuple[DynamicPattern, ...] | None, ...]
    notes: tuple[str, ...] = ()
    min_seq_len: int | None = None


def read_list(data: list[Any], label: str, *, qwen: bool = False) -> Heads:
    """MInference's list, an object a layer; None among them leaves a layer out.

    Raises:
        ValueError: Naming layer, head, value and limit.
    """
    notes: dict[str, list[str]] = {}
    layers = tuple(
        None if entry is None and qwen else _layer(entry, label, number, notes, qwen)
        for number, entry in enumerate(data)
    )
    lines = (f"{text} (of {len(places)}, the first: {places[0]})" for text, places in notes.items())
    return Heads(layers, tuple(lines))


def sparse_config(data: dict[str, Any]) -> dict[str, Any] | None:
    """The object of a file in which Qwen's models keep their list: the file itself, or a part of a config.json."""
    for part in (data, data.get(_DUAL_CHUNK)):
        if isinstance(part, dict) and part.get(SPARSE_CONFIG) is not None:
            return part
    return None


def read_sparse_config(part: dict[str, Any], label: str) -> Heads:
    """Qwen's configuration: the list, or an object of layer numbers, and from which length on it is meant.

    Raises:
        ValueError: As ``read_list``, or a threshold that is no number of tokens.
    """
    listed = part[SPARSE_CONFIG]
    if isinstance(listed, dict) and listed:
        numbers = _numbers(listed, f"{label}: {SPARSE_CONFIG}", "layer")
        listed = [listed.get(str(number)) for number in range(max(numbers) + 1)]
    if not isinstance(listed, list) or not listed:
        raise ValueError(f"{label}: {SPARSE_CONFIG}: holds {short(listed)}; expected a list with an object a layer")
    heads = read_list(listed, label, qwen=True)
    threshold = part.get(_THRESHOLD)
    if threshold is None:
        return heads
    if type(threshold) is not int or not 0 <= threshold < 2**31 - 1:
        raise ValueError(f"{label}: {_THRESHOLD}: {short(threshold)} is not valid: should be a number of tokens")
    return heads._replace(min_seq_len=threshold + 1)


def _layer(entry: Any, label: str, layer: int, notes: dict[str, list[str]], qwen: bool) -> tuple[DynamicPattern, ...]:
    where = f"{label}: layer {layer}"
    if not isinstance(entry, dict) or not entry:
        raise ValueError(
            f'{where}: holds {short(entry)}; expected an object of heads such as {{"0": ["vertical_and_slash", 1000, '
            "6096, 0.9]}"
        )
    numbers = _numbers(entry, where, "head")
    missing = sorted(set(range(len(numbers))) - numbers)
    if missing:
        raise ValueError(
            f"{where}: has {len(numbers)} heads up to number {max(numbers)}, but not head {missing[0]}; "
            "number them from 0 without a gap"
        )
    made = []
    for head in range(len(numbers)):
        pattern, found = _head(entry[str(head)], f"{where}, head {head}", qwen)
        made.append(pattern)
        for note in found:
            notes.setdefault(note, []).append(f"layer {layer}, head {head}: {entry[str(head)][1:3]}")
    return tuple(made)


def _numbers(entry: dict[str, Any], where: str, kind: str) -> set[int]:
    for name in entry:
        if not re.fullmatch(r"0|[1-9][0-9]{0,5}", name):
            raise ValueError(
                f"{where}: {short(name)} is no {kind} number; write 0, 1, ... without signs or zeros before"
            )
    return {int(name) for name in entry}


def _head(entry: Any, where: str, qwen: bool) -> tuple[DynamicPattern, list[str]]:
    """A head's pattern, and what else than its numbers was taken."""
    if not isinstance(entry, list | tuple) or len(entry) != 4:
        raise ValueError(f"{where}: holds {short(entry)}; expected [type, vertical, slash, score]")
    kind, vertical, slash, score = entry
    if not isinstance(kind, str) or kind not in _TYPES:
        near = difflib.get_close_matches(str(kind)[:100], _TYPES, n=1)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"{where}: {short(kind)} is no type{hint} (valid: {', '.join(_TYPES)})")
    if type(score) not in (int, float) and not (qwen and score is None):
        raise ValueError(f"{where}: score: {short(score)} is not valid: should be a number")
    # Their code goes by the sizes, not by the type.
    if kind == _FLEX or (kind == "vertical_and_slash" and isinstance(vertical, list) and isinstance(slash, list)):
        return _flex(vertical, slash, where)
    for name, value in (("vertical", vertical), ("slash", slash)):
        if type(value) is not int or value < 0:
            raise ValueError(f"{where}: {name}: {short(value)} is not valid: should be a whole number, 0 or more")
    if kind == "dense":
        return make_pattern({"pattern": "dense"}, where=where), []
    if kind == "stream_llm":
        return make_pattern({"pattern": "a_shape", "n_init": vertical, "n_local": slash}, where=where), []
    if kind == "block_sparse":
        note = f"block_sparse heads take {_BLOCKS} blocks: MInference's kernel ignores a file's number"
        pattern = make_pattern({"pattern": "block_sparse", "top_k": _BLOCKS}, where=where)
        return pattern, [] if vertical == _BLOCKS else [note]
    notes = []
    if qwen and vertical == _SMALLEST:
        vertical += _ADDED
        notes.append(f"a vertical of {_SMALLEST} becomes {vertical}, as in Qwen's code")
    if vertical < _LEAST_VERTICAL or slash < _LEAST_SLASH:
        least = f"{_LEAST_VERTICAL} verticals and {_LEAST_SLASH} slashes"
        notes.append(f"at least {least} are taken, as in MInference's code")
    sizes = {"vertical_size": max(vertical, _LEAST_VERTICAL), "slash_size": max(slash, _LEAST_SLASH)}
    return make_pattern({"pattern": "vertical_slash", **sizes}, where=where), notes


def _flex(vertical: Any, slash: Any, where: str) -> tuple[DynamicPattern, list[str]]:
    """``[gamma, most]`` for keys and for diagonals: the share that they must hold, and at most how many."""
    for name, size in (("vertical", vertical), ("slash", slash)):
        if not isinstance(size, list) or len(size) != 2:
            raise ValueError(f"{where}: {name}: {short(size)} is not valid: should be [gamma, budget]")
        if type(size[0]) not in (int, float) or not 0 <= size[0] <= 1:
            raise ValueError(f"{where}: {name}: gamma {short(size[0])} is not valid: should be a share from 0 to 1")
        if type(size[1]) is not int or size[1] < 1:
            raise ValueError(f"{where}: {name}: budget {short(size[1])} is not valid: should be a whole number above 0")
    # Tiles of 64 rows, as every other head of these files; no pooled attention, as in their code.
    parameters = {"gamma": float(max(vertical[0], slash[0])), "tau": 0.0, "max_budget": max(vertical[1], slash[1])}
    notes = [f"a {_FLEX} head's budget is the most keys, and the most diagonals, as in MInference's code (max_budget)"]
    if vertical != slash:
        notes.append("the larger of a head's two gammas and budgets is taken for both")
    return make_pattern({"pattern": "flexprefill", "block_size": 64, **parameters}, where=where), notes


def short(value: Any) -> str:
    """A value for an error: files may hold anything."""
    if isinstance(value, list | dict) and value:
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
