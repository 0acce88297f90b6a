"""Readable tables from JSON that no Markdown explains."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

MAX_ROWS = 200
MAX_COLUMNS = 24
MAX_TABLES = 40
MAX_LETTERS = 200
MAX_DEPTH = 4
_MAX_LISTED = 6

_NUMBER = re.compile(r"[<>~±+-]?\s*\.?\d")


@dataclass(frozen=True)
class Table:
    """A table.

    Attributes:
        title: Above it; may be empty.
        columns: Headings; none in a table of keys and values.
        rows: Cells.
        note: Under it: what is not shown.
    """

    title: str
    columns: list[str]
    rows: list[list[str]]
    note: str = ""

    @property
    def numeric(self) -> list[bool]:
        """Which columns hold figures."""
        return [is_numeric(column) for column in zip(*self.rows, strict=True)]


def is_numeric(cells: Sequence[str]) -> bool:
    """Whether the cells of a column are figures, maybe with units, intervals or remarks in brackets."""
    filled = [re.sub(r"\([^)]*\)", "", cell).strip() for cell in cells if cell.strip() not in ("", "-")]
    return bool(filled) and all(
        _NUMBER.match(cell) and sum(map(str.isalpha, cell)) <= sum(map(str.isdigit, cell)) for cell in filled
    )


def tables_of(value: Any, *, without: Sequence[str] = ()) -> list[Table]:
    """All that a JSON value holds, as far as it can be read as tables.

    Args:
        value: The JSON.
        without: Keys that stand elsewhere in the page; of theirs only lists of objects are taken.
    """
    found: list[Table] = []
    for table in _tables("", value, without):
        if len(found) == MAX_TABLES:
            break
        found.append(table)
    return found


def _tables(title: str, value: Any, without: Sequence[str] = (), depth: int = 0) -> Iterator[Table]:
    if _is_list_of_objects(value):
        yield _of_objects(title, value)
        return
    if not isinstance(value, dict) or depth == MAX_DEPTH:
        yield Table(title, [], [["", cell(value)]])
        return
    nested = {key: item for key, item in value.items() if isinstance(item, dict) or _is_list_of_objects(item)}
    plain = [[key, cell(item)] for key, item in value.items() if key not in nested and key not in without]
    if plain:
        yield _cut(Table(title, [], plain))
    for key, item in nested.items():
        name = f"{title}.{key}" if title else key
        if key not in without:
            yield from _tables(name, item, depth=depth + 1)
        elif isinstance(item, dict):
            yield from (_of_objects(f"{name}.{k}", v) for k, v in item.items() if _is_list_of_objects(v))


def _is_list_of_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _of_objects(title: str, items: list[dict[str, Any]]) -> Table:
    columns = list(dict.fromkeys(key for item in items for key in item))
    note = f"{len(columns) - MAX_COLUMNS} more columns are in the JSON" if len(columns) > MAX_COLUMNS else ""
    columns = columns[:MAX_COLUMNS]
    return _cut(Table(title, columns, [[cell(item.get(key)) for key in columns] for item in items], note))


def _cut(table: Table) -> Table:
    left = len(table.rows) - MAX_ROWS
    if left <= 0:
        return table
    note = "; ".join(filter(None, [table.note, f"{left} more rows are in the JSON"]))
    return Table(table.title, table.columns, table.rows[:MAX_ROWS], note)


def cell(value: Any) -> str:
    """A value in a few letters."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str | int):
        return _shortened(str(value))
    if isinstance(value, list) and value and all(_is_number(item) for item in value):
        return _figures(value)
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return _shortened(", ".join(value))
    return _shortened(json.dumps(value, ensure_ascii=False))


def _figures(values: list[float]) -> str:
    if len(values) <= _MAX_LISTED:
        return _shortened(", ".join(cell(value) for value in values))
    try:
        return _shortened(
            f"{len(values)} values, median {statistics.median(values):.6g}, {cell(min(values))} to {cell(max(values))}"
        )
    except OverflowError:
        return f"{len(values)} values"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_LETTERS else f"{text[: MAX_LETTERS - 3]}..."
