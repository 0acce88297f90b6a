"""Patterns by name: what users write, what they get, and what a mistake says."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest

from vllm_trimix.patterns.registry import PATTERNS, describe, make_pattern

WHERE = "trimix.shallow"


@pytest.mark.parametrize("name", PATTERNS)
def test_a_name_alone_gives_the_defaults(name: str) -> None:
    pattern = make_pattern({"pattern": name}, where=WHERE)
    assert pattern == PATTERNS[name]()
    entry = describe(pattern)
    assert list(entry) == ["pattern", *(field.name for field in dataclasses.fields(PATTERNS[name]))]
    assert make_pattern(json.loads(json.dumps(entry)), where=WHERE) == pattern
    assert hash(pattern) == hash(make_pattern(entry, where=WHERE))


BAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "typo": (
        {"pattern": "vertical-slash"},
        ["shallow.pattern: 'vertical-slash'", "did you mean 'vertical_slash'"],
    ),
    "nothing-near": ({"pattern": "zzz"}, ["'zzz' is not a pattern (valid: a_shape, "]),
    "no-name": ({"gamma": 0.9}, ["trimix.shallow.pattern: None is not a pattern"]),
    "list": ({"pattern": ["dense"]}, ["trimix.shallow.pattern: ['dense'] is not a pattern"]),
    "parameter": (
        {"pattern": "a_shape", "n_locl": 5},
        ["trimix.shallow: a_shape has no parameter 'n_locl'; did you mean 'n_local'? (valid: n_init, n_local"],
    ),
    "others-parameter": ({"pattern": "dense", "gamma": 0.9}, ["dense has no parameter 'gamma' (valid: block_size)"]),
    "negative": ({"pattern": "a_shape", "n_init": -1}, ["trimix.shallow.n_init: -1", "greater than or equal to 0"]),
    "no-window": ({"pattern": "a_shape", "n_local": 0}, ["n_local: 0", "greater than or equal to 1"]),
    "too-wide": ({"pattern": "a_shape", "n_local": 2**31}, ["n_local: 2147483648", "2147483647"]),
    "verticals": ({"pattern": "vertical_slash", "vertical_size": 29}, ["vertical_size: 29", "equal to 30"]),
    "too-many-verticals": ({"pattern": "vertical_slash", "vertical_size": 2**15 + 1}, ["32769", "32768"]),
    "slashes": ({"pattern": "vertical_slash", "slash_size": 49}, ["slash_size: 49", "equal to 50"]),
    "top_k": ({"pattern": "block_sparse", "top_k": 1}, ["top_k: 1 ", "equal to 2"]),
    "gamma-negative": ({"pattern": "flexprefill", "gamma": -0.5}, ["gamma: -0.5", "greater than or equal to 0"]),
    "budgets": ({"pattern": "flexprefill", "min_budget": 9, "max_budget": 8}, ["min_budget: 9", "max_budget (8)"]),
    "gamma-2": ({"pattern": "flexprefill", "gamma": 2.0}, ["gamma: 2.0", "less than or equal to 1"]),
    "gamma-nan": ({"pattern": "flexprefill", "gamma": float("nan")}, ["gamma: nan"]),
    "tau": ({"pattern": "flexprefill", "tau": -0.1}, ["tau: -0.1", "equal to 0"]),
    "threshold": ({"pattern": "xattention", "threshold": "0.9"}, ["threshold: '0.9'", "number"]),
    "stride": ({"pattern": "xattention", "stride": 6}, ["stride: 6", "multiple of 4"]),
    "stride-and-block": (
        {"pattern": "xattention", "stride": 12},
        ["12 does not divide block_size (128)"],
    ),
    "block_size": ({"pattern": "dense", "block_size": 32}, ["block_size: 32", "64 or 128"]),
    "bool": ({"pattern": "block_sparse", "top_k": True}, ["top_k: True", "integer"]),
    "float": ({"pattern": "block_sparse", "top_k": 8.0}, ["top_k: 8.0", "integer"]),
    "two": ({"pattern": "flexprefill", "gamma": -1, "tau": 2}, ["gamma: -1", "; trimix.shallow.tau: 2"]),
}


@pytest.mark.parametrize("case", BAD)
def test_errors_name_the_key_the_value_and_the_limit(case: str) -> None:
    entry, parts = BAD[case]
    with pytest.raises(ValueError, match=r"^trimix\.shallow") as error:
        make_pattern(entry, where=WHERE)
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)
