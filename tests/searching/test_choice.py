"""The choice within a budget: by head, by layer, by block size; candidates as published and from files."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.block_sparse import BlockSparse
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.flexprefill import FlexPrefill
from vllm_trimix.patterns.vertical_slash import VerticalSlash
from vllm_trimix.patterns.xattention import XAttention
from vllm_trimix.searching.candidates import name_of, published, read
from vllm_trimix.searching.choice import Budget, by_block_size, per_head, per_layer

DENSITIES = [0.1, 0.3, 0.5, 1.0]


@pytest.mark.parametrize(
    ("losses", "share", "chosen"),
    [
        ([0.4, 0.2, 0.1, 0.0], 0.5, 2),
        ([0.4, 0.2, 0.1, 0.0], 0.49, 1),
        ([0.4, 0.2, 0.1, 0.0], 1.0, 3),
        # Equal within the tolerance: the cheapest.
        ([0.105, 0.12, 0.1, 0.0], 0.5, 0),
        ([0.4, 0.105, 0.1, 0.0], 0.5, 1),
        ([0.0, 0.0, 0.0, 0.0], 1.0, 0),
        # Nothing is affordable: the cheapest.
        ([0.4, 0.2, 0.1, 0.0], 0.05, 0),
    ],
)
def test_a_head_takes_the_best_it_can_afford(losses: list[float], share: float, chosen: int) -> None:
    assert per_head([losses], [DENSITIES], share=share, tolerance=0.01) == [chosen]
    assert Budget(share, "head").choose([losses], [DENSITIES], 0.01) == [chosen]


def test_what_costs_the_same_is_decided_by_the_loss() -> None:
    for share in (1.0, 0.1):
        assert per_head([[0.3, 0.1, 0.1]], [[0.2, 0.2, 0.2]], share=share, tolerance=0.01) == [1]
    # What is also equally good, by the order: simple candidates stand first.
    for share in (1.0, 0.1):
        assert per_head([[0.105, 0.1]], [[0.2, 0.2]], share=share, tolerance=0.01) == [0]


def test_a_layer_spends_where_a_key_gains_most() -> None:
    """Keys are too few for both: the head that loses more by far gets dense attention."""
    losses = [[0.001, 0.0, 0.0, 0.0], [0.9, 0.9, 0.9, 0.0], [0.3, 0.1, 0.09, 0.0]]
    densities = [DENSITIES] * 3
    # 0.3 to begin with; then head 2's small step (1.0 a key) and head 1's large one (1.0), in turn.
    assert per_layer(losses, densities, share=0.5, tolerance=0.01) == [0, 3, 1]
    assert per_layer(losses, densities, share=0.4, tolerance=0.01) == [0, 3, 0]
    assert per_layer(losses, densities, share=0.3, tolerance=0.01) == [0, 0, 2]
    assert per_layer(losses, densities, share=0.01, tolerance=0.01) == [0, 0, 0]
    assert per_layer(losses, densities, share=1.0, tolerance=0.01) == [0, 3, 3]
    # 0.44 to spend: a key gains 0.9 in head 0 and 0.56 in head 1, which would gain more in all.
    losses, densities = [[0.3, 0.12, 0.12], [0.5, 0.5, 0.28]], [[0.1, 0.3, 1.0], [0.1, 0.3, 0.5]]
    assert per_layer(losses, densities, share=0.32, tolerance=0.01) == [1, 0]
    losses, densities = [[0.001, 0.0, 0.0, 0.0], [0.9, 0.9, 0.9, 0.0], [0.3, 0.1, 0.09, 0.0]], [DENSITIES] * 3
    assert Budget(0.4, "layer").choose(losses, densities, 0.01) == [0, 3, 0]


_SHARES = st.floats(0.0, 1.0)


@settings(deadline=None)
@given(
    st.lists(st.lists(st.tuples(_SHARES, _SHARES), min_size=3, max_size=3), min_size=1, max_size=5), _SHARES, _SHARES
)
def test_no_budget_is_overdrawn(heads: list[list[tuple[float, float]]], share: float, tolerance: float) -> None:
    losses = [[loss for loss, _ in row] for row in heads]
    densities = [[density for _, density in row] for row in heads]
    least = [min(row) for row in densities]
    alone = per_head(losses, densities, share=share, tolerance=tolerance)
    for density, index, low in zip(densities, alone, least, strict=True):
        assert density[index] <= max(share, low) + 2e-9
    together = per_layer(losses, densities, share=share, tolerance=tolerance)
    spent = sum(density[index] for density, index in zip(densities, together, strict=True))
    assert spent <= max(share * len(heads), sum(least)) + 1e-8
    # What is bought gains.
    start = per_layer(losses, densities, share=0.0, tolerance=tolerance)
    for loss, index, first in zip(losses, together, start, strict=True):
        assert index == first or loss[index] < loss[first] - tolerance


def test_one_block_size_a_layer() -> None:
    candidates = [AShape(block_size=64), AShape(block_size=128), Dense(block_size=64), Dense(block_size=128)]
    budget = Budget(0.5, "head")
    densities = [[0.2, 0.3, 1.0, 1.0]] * 2
    # Head 0 would take 64, head 1 would take 128; together 128 is better.
    losses = [[0.1, 0.2, 0.0, 0.0], [0.9, 0.1, 0.0, 0.0]]
    assert by_block_size(candidates, losses, densities, choose=budget.choose, tolerance=0.01) == [1, 1]
    # Equal: the cheaper one, which may be the larger size.
    assert by_block_size(candidates, [[0.1, 0.1, 0, 0]], [[0.3, 0.2, 1, 1]], choose=budget.choose, tolerance=0.01) == [
        1
    ]
    losses = [[0.1, 0.1, 0.0, 0.0], [0.11, 0.1, 0.0, 0.0]]
    assert by_block_size(candidates, losses, densities, choose=budget.choose, tolerance=0.01) == [0, 0]


def test_the_published_candidates() -> None:
    assert published(30000) == published(128000)
    assert published(30000) == (
        AShape(100, 800),
        VerticalSlash(30, 800),
        VerticalSlash(100, 750),
        VerticalSlash(500, 700),
        VerticalSlash(3500, 100),
        VerticalSlash(1000, 4096),
        VerticalSlash(1000, 6096),
        BlockSparse(100),
        Dense(),
    )
    half = published(15000)
    assert half[0] == AShape(50, 400)
    assert half[-3:] == (VerticalSlash(500, 3048), BlockSparse(50), Dense())
    # Patterns have least sizes, and what is one candidate then stands once.
    assert published(100) == (AShape(4, 64), VerticalSlash(30, 50), BlockSparse(2), Dense())
    more = published(30000, also=("flexprefill", "xattention"))
    assert more[8:] == (FlexPrefill(block_size=64), XAttention(block_size=64), Dense())
    assert {pattern.block_size for pattern in more} == {64}


def test_names() -> None:
    names = [name_of(pattern) for pattern in (AShape(4, 16), Dense(), Dense(block_size=128), FlexPrefill(gamma=0.9))]
    assert names == ["a_shape 4/16", "dense", "dense b128", "flexprefill 0.9/0.1 b128"]
    assert name_of(FlexPrefill(gamma=0.9, max_budget=4096)) == "flexprefill 0.9/0.1 max_budget=4096 b128"
    assert len({name_of(pattern) for pattern in published(30000)}) == 9


def test_candidates_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "candidates.json"
    path.write_text('[{"pattern": "a_shape", "n_init": 4, "n_local": 16}, {"pattern": "dense"}]')
    assert read(path) == (AShape(4, 16), Dense())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "not JSON"),
        ("[]", "expected a list of entries such as"),
        ('{"pattern": "dense"}', "expected a list of entries such as"),
        ("[3]", "entry 1: expected an object with a pattern (a_shape, "),
        (
            '[{"pattern": "dense"}, {"pattern": "a_shap"}]',
            "entry 2.pattern: 'a_shap' is not a pattern; did you mean 'a_sh",
        ),
        ('[{"pattern": "a_shape", "n_local": 0}]', "entry 1.n_local: 0 is not valid"),
        ('[{"pattern": "dense"}, {"pattern": "dense", "block_size": 64}]', "entry 2: is entry 1 again; keep one"),
    ],
)
def test_bad_candidates(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "candidates.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(path)
