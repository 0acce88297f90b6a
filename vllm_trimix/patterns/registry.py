"""The dynamic patterns by name, and how one is made of what users write."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.block_sparse import BlockSparse
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.flexprefill import FlexPrefill
from vllm_trimix.patterns.vertical_slash import VerticalSlash
from vllm_trimix.patterns.xattention import XAttention
from vllm_trimix.untrusted import quoted

PATTERNS: dict[str, Any] = {
    pattern.name: pattern for pattern in (AShape, VerticalSlash, BlockSparse, FlexPrefill, XAttention, Dense)
}


def make_pattern(entry: Mapping[str, Any], *, where: str, beside: tuple[str, ...] = ()) -> DynamicPattern:
    """Makes the pattern that ``entry`` describes: its ``pattern`` by name, and parameters.

    Args:
        entry: E.g. ``{"pattern": "flexprefill", "gamma": 0.95}``.
        where: What to call the entry in errors.
        beside: Other keys that users may write there, for the nearest valid key.

    Raises:
        ValueError: Naming the bad key, its value, the limit and the nearest valid key.
    """
    name = entry.get("pattern")
    # A list or an object has no hash.
    if not isinstance(name, str) or name not in PATTERNS:
        near = difflib.get_close_matches(name[:100], PATTERNS, n=1) if isinstance(name, str) else []
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ValueError(f"{where}.pattern: {quoted(name)} is not a pattern{hint} (valid: {', '.join(PATTERNS)})")
    cls = PATTERNS[name]
    parameters = {key: value for key, value in entry.items() if key != "pattern"}
    own = [field.name for field in dataclasses.fields(cls)]
    valid = [*own, *(key for key in beside if key != "pattern")]
    for key in parameters:
        if key not in own:
            near = difflib.get_close_matches(str(key)[:100], valid, n=1, cutoff=0.5)
            hint = f"; did you mean '{near[0]}'?" if near else ""
            raise ValueError(f"{where}: {name} has no parameter {quoted(key)}{hint} (valid: {', '.join(valid)})")
    try:
        pattern: DynamicPattern = cls(**parameters)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(where, item) for item in error.errors())) from None
    return pattern


def describe(pattern: DynamicPattern) -> dict[str, Any]:
    """A pattern as ``make_pattern`` reads it, every parameter named."""
    return {"pattern": pattern.name, **dataclasses.asdict(pattern)}  # type: ignore[call-overload]


def _explain(where: str, item: Any) -> str:
    message = str(item["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    if not item["loc"]:
        return f"{where}: {message}"
    return f"{where}.{item['loc'][0]}: {quoted(item['input'])} is not valid: should be {message}"
