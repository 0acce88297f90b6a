"""Every step of the CUDA path that is driven on CPU tensors: its uploads, launches and copies, in order."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from tests.backend.report import DENSE, STOCK_TAILS
from tests.launches.steps import Layer, Step, wrong


def test_steps_upload_and_launch_what_is_documented(report: dict[str, Any]) -> None:
    """One upload a plan, before any layer; in a triangle layer one launch, or two; no copy; no other stream."""
    found = {name: each["launches"]["problems"] for name, each in report["scenarios"].items()}
    assert {name: problems for name, problems in found.items() if problems} == {}


def test_an_engine_compiles_its_triangle_kernels_once(report: dict[str, Any]) -> None:
    """In every step tensors of the same kinds and alignment: those of the first launch, as of a warm-up."""
    for name, each in report["scenarios"].items():
        for kernel in ("triangle_prefill_kernel", "merge_partials_kernel"):
            assert each["launches"]["compiled"].get(kernel, 0) <= 1, name


@pytest.mark.parametrize("dense", DENSE)
def test_every_kind_of_layer_was_among_them(report: dict[str, Any], dense: str) -> None:
    layers: Counter[str] = Counter()
    uploads: Counter[str] = Counter()
    merged = 0
    for name, each in report["scenarios"].items():
        # A name of a backend may begin another one.
        if name.startswith(f"{dense}-") and (STOCK_TAILS in name) == (STOCK_TAILS in dense):
            layers += Counter(each["launches"]["layers"])
            uploads += Counter(each["launches"]["uploads"])
            merged += each["launches"]["merged"]
    kinds = {"triangle-none", "triangle-slice", "triangle-gather", "dynamic-slice", "dynamic-gather"}
    assert set(layers) == {*kinds, "stock-none", "warm-up-none"}
    assert merged > 0
    # A second one where the patterns leave other rows to the dense kernel than the triangle.
    assert set(uploads) == ({"0", "1"} if STOCK_TAILS in dense else {"0", "1", "2"})


def step(*layers: Layer, uploads: int = 1) -> Step:
    return Step([64] * uploads, list(layers))


def layer(kind: str, *events: str, rows: str = "none", arrays: int = 1, **operations: int) -> Layer:
    return Layer(kind, rows, list(events), Counter(operations), {arrays} if kind == "triangle" else set())


TRIANGLE, MERGE, SPARSE = "triangle_prefill_kernel", "merge_partials_kernel", "sparse_prefill_kernel"
DEFECTS = {
    "three uploads": step(layer("stock", "dense"), uploads=3),
    "launched twice": step(layer("triangle", TRIANGLE, TRIANGLE)),
    "merged first": step(layer("triangle", MERGE, TRIANGLE)),
    "launched in a stock layer": step(layer("stock", "dense", TRIANGLE)),
    "no dense kernel": step(layer("triangle", TRIANGLE, rows="slice")),
    "a dense kernel for nothing": step(layer("triangle", "dense", TRIANGLE)),
    "the dense kernel last": step(layer("triangle", TRIANGLE, "dense", rows="slice")),
    "the triangle's kernel in a pattern's layer": step(layer("dynamic", SPARSE, TRIANGLE)),
    "nothing in a pattern's layer": step(layer("dynamic")),
    "a copy": step(layer("triangle", TRIANGLE, split=1, clone=1)),
    "an allocation": step(layer("stock", "dense", empty_like=1)),
    "a gather too many": step(layer("triangle", "dense", TRIANGLE, rows="gather", index=5, index_put_=1)),
    "another layer's items": step(layer("triangle", TRIANGLE), layer("triangle", TRIANGLE, arrays=2)),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_seen(defect: str) -> None:
    assert len(list(wrong(DEFECTS[defect]))) == 1


def test_documented_steps_are_not_defects() -> None:
    gathered = layer("triangle", "dense", TRIANGLE, MERGE, rows="gather", split=1, index=4, index_put_=1)
    good = step(layer("stock", "dense"), gathered, layer("dynamic", SPARSE), layer("warm-up", TRIANGLE, "dense"))
    assert list(wrong(good)) == []
