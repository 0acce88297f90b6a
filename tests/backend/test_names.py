"""Entries that were pasted from elsewhere, by the name under which they stand."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_trimix.backend import settings
from vllm_trimix.backend.names import OWN_KEYS, misnamed_entry, misplaced
from vllm_trimix.config.entry import TrimixConfig

ENTRY = {"starting_layer": 16}
MEANT = [
    "trianglemix",
    "TRIMIX",
    "TriMix",
    "tri_mix",
    "tri-mix",
    "triangle_mix",
    "trimix_config",
    "vllm_trimix",
    "trmix",
]
OTHERS: list[Any] = [
    {"trimix": ENTRY},
    {"trimix_resolved": {}},
    {"ascend_scheduler_config": {"enabled": True}},
    {"trimix_off": True},
    {"TRIMIX": True},
    {"tri" * 1000: ENTRY},
    {7: ENTRY},
    {},
    None,
    "trianglemix",
]


@pytest.mark.parametrize("name", MEANT)
def test_what_was_meant_for_this_backend_is_known(name: str) -> None:
    assert misnamed_entry({"other": {}, name: ENTRY}) == name
    with pytest.raises(ValueError, match=rf"additional_config\.{name}: TRIMIX reads its entry as 'trimix'"):
        settings._check_place({name: ENTRY})
    # Beside a right entry it may be another plugin's.
    settings._check_place({"trimix": ENTRY, name: ENTRY})


@pytest.mark.parametrize("additional", OTHERS, ids=range(len(OTHERS)))
def test_other_keys_are_none_of_our_business(additional: Any) -> None:
    assert misnamed_entry(additional) is None


def test_keys_without_their_entry_are_told_where_they_belong() -> None:
    with pytest.raises(ValueError, match="starting_layer, n_local stand beside the 'trimix' entry") as refused:
        settings._check_place({"starting_layer": 16, "n_local": 64, "other": 1})
    assert str(refused.value).endswith('{"trimix": {"starting_layer": 16, "n_local": 64}}')
    settings._check_place({"trimix": {}, "layers": 3})
    settings._check_place({"other": 1})


def test_without_trimix_only_what_is_surely_meant_for_it_gets_a_line() -> None:
    assert set(OWN_KEYS) < TrimixConfig.model_fields.keys()
    assert misplaced({"other": 1, "n_local": 64, "starting_layer": 16}) == "starting_layer"
    assert misplaced({"TRIMIX": ENTRY}) == "TRIMIX"
    for additional in ({"layers": 3, "preset": "fast"}, {"trimix": ENTRY, "n_local": 1}, {}, None, "starting_layer"):
        assert misplaced(additional) is None
