"""The matrix is whole: what its entries say of themselves."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.families import store
from tests.families.family import Family
from tests.families.table import FAMILIES


def test_names_are_told_apart() -> None:
    assert [name for name, count in Counter(family.slug for family in FAMILIES).items() if count > 1] == []


def test_no_architecture_is_in_two_entries() -> None:
    covered = Counter(architecture for family in FAMILIES for architecture in family.architectures)
    assert [name for name, count in covered.items() if count > 1] == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.slug)
def test_an_entry_says_all_that_is_checked(family: Family) -> None:
    assert family.published.count("/") == bool(family.published)
    if family.outcome != "served":
        assert family.words
        assert not family.sparse
        assert not family.stock
        return
    layers = sorted([*family.sparse, *family.stock])
    assert layers == list(range(len(layers)))
    # Only rows that later layers read change an answer: in the last layer, the last rows are dense.
    assert not family.sparse or min(family.sparse) < layers[-1]


def test_the_fast_tests_run_at_most_six() -> None:
    assert len([family for family in FAMILIES if family.feature]) <= 6


def test_every_registered_decoder_is_in_one_entry() -> None:
    """Of vLLM's own model code, of what its Transformers backend is known to run, and that backend by itself."""
    # Heavy.
    from vllm.model_executor.models import registry

    names = [
        *registry._TEXT_GENERATION_MODELS,
        *registry._TRANSFORMERS_SUPPORTED_MODELS,
        "TransformersForCausalLM",
        "TransformersMoEForCausalLM",
    ]
    text = {name for name in names if name in registry._TEXT_GENERATION_MODELS or name.endswith("ForCausalLM")}
    covered = {architecture for family in FAMILIES for architecture in family.architectures}
    assert sorted(covered - text) == []
    assert sorted(text - covered) == []


def test_the_page_says_what_the_entries_say() -> None:
    text = store.DOCS.read_text()
    missing = [row for table in store.rows(FAMILIES).values() for row in table if row not in text]
    assert missing == [], "run them, then python -m tests.families.table --write-docs"
    assert text.count("\n| ") == len(FAMILIES) + 3
