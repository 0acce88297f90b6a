"""The stage of served engines: its box of seconds, its arithmetic, and which engines a device holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from benchmarks.gpu.served.box import Round, fill
from benchmarks.gpu.served.plan import engine_arguments, plan_engines
from benchmarks.gpu.served.results import Results, Rule, density, targets
from tests.benchmarks.fake_engines import TOY


class Clock:
    """Time that passes only where a round says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def rounds_of(clock: Clock, ran: list[str], *each: tuple[str, float, float, int]) -> list[Round]:
    """Rounds by name, estimate, true seconds and how often."""

    def make(name: str, true: float) -> Callable[[int], bool]:
        def run(number: int) -> bool:
            clock.now += true
            ran.append(f"{name}{number}")
            return name != "once"

        return run

    return [Round(name, make(name, true), estimate, most) for name, estimate, true, most in each]


def test_the_box_runs_everything_once_then_again_while_it_fits() -> None:
    clock, ran = Clock(), []
    rounds = rounds_of(clock, ran, ("a", 20, 21, 9), ("b", 5, 3, 2), ("c", 10, 10, 9), ("once", 1, 1, 9))
    assert fill(rounds, 100, clock=clock) == []
    # 35 seconds, then 34 more; a third "a" ends at 90, and a third "c" just fits.
    assert ran == ["a0", "b0", "c0", "once0", "a1", "b1", "c1", "a2", "c2"]
    assert clock.now - 1000 == 100


def test_the_box_leaves_out_what_does_not_fit_and_goes_on_with_what_does() -> None:
    clock, ran = Clock(), []
    rounds = rounds_of(clock, ran, ("a", 20, 30, 1), ("b", 25, 25, 1), ("c", 10, 10, 1))
    assert fill(rounds, 45, clock=clock) == ["b"]
    assert ran == ["a0", "c0"]
    clock, ran = Clock(), []
    assert fill(rounds_of(clock, ran, ("a", 20, 20, 1)), 19, clock=clock) == ["a"]
    assert ran == []


def test_an_estimate_gives_way_to_what_was_measured() -> None:
    clock, ran = Clock(), []
    assert fill(rounds_of(clock, ran, ("a", 90, 10, 9)), 100, clock=clock) == []
    assert ran == [f"a{number}" for number in range(9)]
    clock, ran = Clock(), []
    assert fill(rounds_of(clock, ran, ("a", 10, 60, 9)), 100, clock=clock) == []
    assert ran == ["a0"]


def test_rows_that_are_due() -> None:
    rule = Rule(chunk=256, last_n=32, dense_len=104, triangle_layers=4, pattern_layers=3, block_size=64)
    assert rule.rows("off", 600)["opt_out"] == 600
    assert rule.rows("triangle", 600) == {
        "triangle": 568,
        "opt_out": 0,
        "triangle_layer_rows": 4 * 568,
        "dynamic_layer_rows": 0,
    }
    # The last chunk has 600 - 512 rows, 56 of them before the last 32: less than a tile.
    assert rule.rows("on", 600)["dynamic_layer_rows"] == 3 * 512
    assert rule.rows("on", 620)["dynamic_layer_rows"] == 3 * 588
    assert rule.rows("triangle", 104)["triangle"] == 0


def test_densities_and_targets() -> None:
    assert density({"keys_read": 10, "keys_causal": 40}) == 0.25
    assert density({"triangle": 3}) is None
    results = Results()

    def add(engine: str, mode: str | None, seconds: list[float], rows: dict[str, int] | None = None) -> None:
        for number, each in enumerate(seconds):
            results.add(engine, mode, 1024, number, {"ttft_s": each, "vllm_ttft_s": None, "rows": rows or {}})

    add("a", "off", [10.0, 12.0, 11.0])
    add("a", "triangle", [7.0, 8.0, 9.0])
    add("a", "on", [4.0, 4.0], {"keys_read": 12, "keys_causal": 100})
    add("b", "off", [10.0])
    add("b", "triangle", [8.0])

    def found(at_density: float) -> list[Any]:
        reached = targets(results, ["a", "b"], longest=1024, at_density=at_density, short=[512, 1024])
        return [target["met"] for target in reached]

    # 12 / 8 is the median of the pairs, 11 / 8 that of the medians.
    assert results.speedups("a", "triangle", 1024) == [10 / 7, 12 / 8, 11 / 9]
    assert found(0.2) == [False, True, None, None, True, None]
    # Denser than the promise is made for: nothing is known of it.
    assert found(0.1) == [False, None, None, None, True, None]
    # Stock's own engine: 10 / 9.9, 12 / 11.9 and 11 / 10.9 are within 2%, tokens that come 3% later are not.
    add("stock", None, [9.9, 11.9, 10.9])
    results.between = {"a": [[0.0103] * 3], "stock": [[0.01] * 3]}
    assert found(0.1)[-2:] == [True, False]
    results.between["a"] = [[0.0101] * 3, [0.0103] * 3, [0.0101] * 3]
    assert found(0.1)[-2:] == [True, True]
    results.samples.extend({**each, "ttft_s": 9.0} for each in results.samples[-3:])
    assert found(0.1)[-2:] == [False, True]
    share = targets(results, ["a", "b"], longest=1024, at_density=1, short=[])[2]["seen"]
    assert share == pytest.approx(1.25 / (10 / 7))


def test_which_engines_fit() -> None:
    settings = {
        **TOY,
        "shape": "llama-3.1-8b",
        "chunks": [8192, 2048],
        "lengths": [131072, 32768],
        "stock_length": 32768,
        "decode": {"length": 1024, "prompts": 16, "tokens": 64},
        "reserve_gib": 10,
    }
    gib = 2**30
    h200 = plan_engines(settings, 139 * gib)
    assert list(h200) == ["trimix_8192", "trimix_2048", "stock"]
    # 16.06 GB of weights, 16.5 GiB and 4.5 GiB of keys and values, 4 GiB beside them.
    assert [round(job["bytes"] / gib, 1) for job in h200.values()] == [35.5, 35.5, 23.5]
    assert all(job["max_model_len"] < job["kv"] / (2 * 32 * 8 * 128 * 2) for job in h200.values())
    assert list(plan_engines(settings, 90 * gib)) == ["trimix_8192", "trimix_2048"]
    assert list(plan_engines(settings, 80 * gib)) == ["trimix_8192"]
    assert list(plan_engines(settings, 40 * gib)) == []


def test_stock_is_started_without_the_plugin() -> None:
    job = {"max_model_len": 600, "chunk": 256, "kv": 2**20, "bytes": 0}
    mine, stock = (engine_arguments(TOY, name, job, "model") for name in ("trimix_256", "stock"))
    assert mine["additional_config"]["trimix"] == TOY["trimix"]
    assert not stock.keys() & {"attention_backend", "additional_config"}
    assert {key: mine[key] for key in stock} == stock
