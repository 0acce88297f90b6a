"""Ranking, the bound, and the choice; what each costs on the circuit models."""

from __future__ import annotations

import math

import pytest

from tests.probing.models import circuit, question, sample, tiny
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing.choice import TriangleModel, choose, orders, rank, upper_bound


def test_rank_takes_the_deeper_among_equals() -> None:
    assert rank([0.0, 2.0, 0.0, 1.0]) == [2, 0, 3, 1]
    assert rank([0.0, 2.0, 0.0, 1.0], excluded=[0, 3]) == [2, 1]


def test_orders_hold_the_same_layers() -> None:
    found = orders([3.0, 1.0, 2.0, 0.0, 0.0], excluded=[1], num_random=2, seed=0)
    assert found["importance"] == [4, 3, 2, 0]
    assert found["deepest"] == [4, 3, 2, 0]
    assert all(sorted(order) == [0, 2, 3, 4] for order in found.values())
    assert found == orders([3.0, 1.0, 2.0, 0.0, 0.0], excluded=[1], num_random=2, seed=0)
    assert found["random 1"] != found["random 2"]


def test_the_bound_is_students() -> None:
    """One-sided 95%: mean + 1.860 s / 3 for nine values (any table of Student's t, 8 degrees of freedom)."""
    values = [0.01 * n for n in range(9)]
    spread = math.sqrt(sum((v - 0.04) ** 2 for v in values) / 8)
    assert upper_bound(values) == pytest.approx(0.04 + 1.8595 * spread / 3, rel=1e-4)
    assert upper_bound([0.0, 0.0]) == 0
    assert upper_bound([0.0]) == math.inf


@pytest.mark.parametrize(
    ("drops", "expected"),
    [
        ([[0.0, 0.0]], 0),
        ([[0.0, 0.0], [0.009, 0.009], [0.011, 0.011]], 1),
        # The mean is small, but not surely.
        ([[0.0, 0.0], [0.0, 0.018]], 0),
        # A gain is no loss; a later k may be better than one before.
        ([[0.0, 0.0], [0.5, 0.5], [-0.2, -0.2]], 2),
    ],
)
def test_choice(drops: list[list[float]], expected: int) -> None:
    assert choose(drops) == expected


def test_quality_is_the_answers_log_probability() -> None:
    model, probe = tiny("llama"), sample(60, 3)
    with TriangleModel(model, Triangle(3, 17, 9)) as triangle:
        dense = triangle.quality(probe, ())
        sparse = triangle.quality(probe, (1, 2))
        assert triangle.quality(probe, ()) == dense
    assert dense.logprob < 0
    assert sparse.logprob != dense.logprob
    assert not hasattr(model.model.layers[0].self_attn, "trimix")


def test_windowed_layers_are_found() -> None:
    for name, layers in (("gemma2", {0, 2}), ("gemma3", {0, 1, 2, 3}), ("llama", set())):
        with TriangleModel(tiny(name), Triangle(3, 17, 9)) as triangle:
            assert triangle.stock == dict.fromkeys(layers, "sliding_window")


@pytest.mark.parametrize("lookup", [1, 2, 3, 4, 5])
def test_ablation_finds_the_lookup_layer_at_every_depth(lookup: int) -> None:
    model, tokenizer = circuit(lookup=lookup)
    probe = question(tokenizer, tokens=800, hops=2, seed=3)
    with TriangleModel(model, Triangle()) as triangle:
        dense = triangle.quality(probe, ())
        for layer in range(8):
            now = triangle.quality(probe, (layer,))
            assert now.correct is (layer != lookup)
            assert (dense.logprob - now.logprob > 5) is (layer == lookup)
        others = set(range(8)) - {lookup}
        assert triangle.quality(probe, others).logprob == pytest.approx(dense.logprob, abs=1e-6)
