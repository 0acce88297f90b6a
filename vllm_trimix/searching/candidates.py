"""Candidates of the search: the published list, or a file."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.registry import PATTERNS, make_pattern

SEARCH_LENGTH = 30000
"""Tokens of the prompts for which the published sizes were made."""

# MInference's search space (arXiv 2407.02490): sinks and window; columns and diagonals; blocks.
_STREAM = ((100, 800),)
_VERTICAL_SLASH = ((30, 800), (100, 750), (500, 700), (3500, 100), (1000, 4096), (1000, 6096))
_BLOCKS = (100,)
_BLOCK_SIZE = 64


def published(length: int, *, also: tuple[str, ...] = ()) -> tuple[DynamicPattern, ...]:
    """MInference's candidates and ``dense``, all of one block size.

    For prompts below ``SEARCH_LENGTH`` sizes shrink with the length: as they are they would cover a short prompt.

    Args:
        length: Longest prompt of the search, in tokens.
        also: Adaptive patterns to add.
    """
    share = min(1.0, length / SEARCH_LENGTH)

    def scaled(size: int, least: int) -> int:
        return max(least, round(size * share))

    entries: list[dict[str, Any]] = [
        {"pattern": "a_shape", "n_init": scaled(sinks, 4), "n_local": scaled(window, 64)} for sinks, window in _STREAM
    ]
    entries += [
        {"pattern": "vertical_slash", "vertical_size": scaled(columns, 30), "slash_size": scaled(slashes, 50)}
        for columns, slashes in _VERTICAL_SLASH
    ]
    entries += [{"pattern": "block_sparse", "top_k": scaled(blocks, 2)} for blocks in _BLOCKS]
    entries += [{"pattern": name} for name in (*also, "dense")]
    made = (make_pattern({**entry, "block_size": _BLOCK_SIZE}, where="candidates") for entry in entries)
    # Scaled down, two of them may be one.
    return tuple(dict.fromkeys(made))


def read(path: Path) -> tuple[DynamicPattern, ...]:
    """Candidates from a file: a JSON list of entries such as ``{"pattern": "a_shape", "n_local": 1024}``.

    Raises:
        ValueError: Naming the entry, the bad key or value and the limit.
        OSError: The file can't be read.
    """
    label = f"--candidates: {path}"
    try:
        entries = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{label}: not JSON: {error}") from None
    if not isinstance(entries, list) or not entries:
        raise ValueError(f'{label}: expected a list of entries such as {{"pattern": "a_shape", "n_local": 1024}}')
    found: list[DynamicPattern] = []
    for number, entry in enumerate(entries, start=1):
        where = f"{label}, entry {number}"
        if not isinstance(entry, dict):
            raise ValueError(f"{where}: expected an object with a pattern ({', '.join(PATTERNS)}), got {entry!r:.60}")
        pattern = make_pattern(entry, where=where)
        if pattern in found:
            raise ValueError(f"{where}: is entry {found.index(pattern) + 1} again; keep one")
        found.append(pattern)
    return tuple(found)


def name_of(pattern: DynamicPattern) -> str:
    """A short name for tables and plots, e.g. ``vertical_slash 1000/6096``; limits that may be off come by name."""
    fields = dataclasses.fields(pattern)  # type: ignore[arg-type]
    values = {field.name: getattr(pattern, field.name) for field in fields}
    size = values.pop("block_size")
    # Pydantic's dataclasses keep more than the default there.
    defaults = {field.name: getattr(field.default, "default", field.default) for field in fields}
    limits = {name: default for name, default in defaults.items() if default in (0, None)}
    words = [pattern.name, "/".join(str(value) for name, value in values.items() if name not in limits)]
    words += [f"{name}={values[name]}" for name, off in limits.items() if values[name] != off]
    words += [f"b{size}"] if size != _BLOCK_SIZE else []
    return " ".join(word for word in words if word)
