"""One layer's prefill, kernel against kernel: ready and found right beside other stages, timed alone.

Three stages: the triangle against dense attention, the ways of prefill, and the launch shapes by head size.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from typing import Any

import torch

from benchmarks.gpu.predicted import layer_seconds
from benchmarks.gpu.report import Report
from benchmarks.gpu.served.results import words
from benchmarks.kernels import tiles
from benchmarks.kernels.contenders import CONTENDERS, dense_baseline, select
from benchmarks.kernels.problem import Settings, check, make_problem
from benchmarks.kernels.timing import Measurement, Result
from vllm_trimix.kernels.triton_configs import config_for
from vllm_trimix.measurement.intervals import median_interval
from vllm_trimix.patterns.triangle import Triangle

_WORKERS = 8
# Of a prompt that a candidate is compiled on: enough for last rows whose keys are split.
_COMPILED_TOKENS = 4096
# A launch shape must be faster by this much to be worth a change, and all of its interval must be faster.
_WORTH = 0.02


def layer_line(report: Report) -> None:
    """The triangle layer against the device's dense attention, by prompt length."""
    started, layer = time.monotonic(), _layer(report, report.settings["layer"])
    names = [dense_baseline(layer), report.settings["ours"]]
    measured = {length: _ready(report, layer, length, names) for length in report.settings["lengths"]}
    _time(report, {words(length): measurement for length, measurement in measured.items()}, started)
    goals = dict(report.settings["targets"])
    bounds = _predict(report)
    said, reached = [], []
    for length, measurement in measured.items():
        dense, ours = (measurement.results[name] for name in names)
        speedup = _speedup(dense, ours)
        if speedup is None:
            continue
        goal, best = goals.get(length), bounds.get(length)
        at_best = best["dense"] / best[names[1]] if best else None
        notes = [f"target {goal:g}x"] if goal else []
        notes += [f"by arithmetic at best {at_best:.0f}x"] if at_best else []
        said.append(
            f"{words(length)}: {names[0]} {_ms(dense)}, {names[1]} {_ms(ours)}, {speedup:.1f}x"
            + (f" ({', '.join(notes)})" if notes else "")
        )
        met = goal and speedup >= goal
        reached.append({"length": length, "speedup": speedup, "target": goal, "at_best": at_best, "met": met})
    report.figure(targets=reached)
    report.seen("; ".join(said))


def ways(report: Report) -> None:
    """The ways of prefill behind one interface, each checked against its own mask."""
    started, layer = time.monotonic(), _layer(report, report.settings["layer"])
    dense = dense_baseline(layer)
    names = [dense, *report.settings["ways"]]
    _predict(report)
    measured = {length: _ready(report, layer, length, names) for length in report.settings["lengths"]}
    _time(report, {words(length): measurement for length, measurement in measured.items()}, started)
    said = []
    for length, measurement in measured.items():
        timed = {name: result for name, result in measurement.results.items() if result.samples}
        ranked = sorted(timed, key=lambda name: statistics.median(timed[name].samples))
        said.append(f"{words(length)}: " + ", ".join(f"{name} {_ms(timed[name])}" for name in ranked))
    report.seen("; ".join(said))


def _predict(report: Report) -> dict[int, dict[str, float]]:
    """What the bounds allow each way, by length; kept with the result."""
    bounds = layer_seconds(report.environment, report.settings["layer"], report.settings["lengths"])
    report.figure(predicted_s=bounds)
    return bounds


def tile_table(report: Report) -> None:
    """Which launch shape is the fastest, by head size; the shipped one first, the line to paste where another wins."""
    started, settings, device = time.monotonic(), report.settings, torch.device(report.device)
    layers = {shape["head_size"]: _layer(report, shape) for shape in settings["layers"]}
    named = {size: [settings["ours"], *_candidates(settings, size)] for size in layers}
    compiled = _compile([(layers[size], name) for size, names in named.items() for name in _able(layers[size], names)])
    report.figure(compile_s=compiled)
    measured = {
        size: _ready(report, layers[size], settings["length"], names, what=f"d{size} ", may_fail=names[1:])
        for size, names in named.items()
    }
    _time(report, {f"d{size}": measurement for size, measurement in measured.items()}, started)
    said, table = [], []
    for size, measurement in measured.items():
        shipped = measurement.results[settings["ours"]]
        ratios = {
            name: [theirs / ours for theirs, ours in zip(result.samples, shipped.samples, strict=True)]
            for name, result in measurement.results.items()
            if result.samples and shipped.samples
        }
        if not ratios:
            continue
        winner = min(ratios, key=lambda name: statistics.median(ratios[name]))
        wins = statistics.median(ratios[winner]) < 1 - _WORTH and median_interval(ratios[winner])[1] < 1
        line = _line(size, winner) if wins and device.type == "cuda" else None
        row = {name: {"of_shipped": statistics.median(found)} for name, found in ratios.items()}
        table.append({"head_size": size, "winner": winner if wins else settings["ours"], "paste": line, "row": row})
        others = ", ".join(f"{name} {row[name]['of_shipped']:.2f}" for name in ratios if name != settings["ours"])
        verdict = f"{winner} wins: {(line or 'no launch shape').strip()}" if wins else "shipped wins"
        said.append(f"d{size}: {verdict}; shipped {_ms(shipped)}, of that {others}")
    report.figure(tiles=table)
    report.seen(" | ".join(said))


def _layer(report: Report, shape: dict[str, int]) -> Settings:
    layer = Settings(
        device=torch.device(report.device),
        dtype=torch.bfloat16,
        fp8=False,
        num_heads=shape["num_heads"],
        num_kv_heads=shape["num_kv_heads"],
        head_size=shape["head_size"],
        block_size=shape["block_size"],
        chunk=shape["chunk"],
        pattern=Triangle(),
        threads=1,
        repeats=report.settings["repeats"],
    )
    check(layer, [])
    torch.set_num_threads(layer.threads)
    return layer


def _able(layer: Settings, names: Iterable[str]) -> list[str]:
    return [name for name in names if CONTENDERS[name].unavailable(layer) is None]


def _ready(
    report: Report, layer: Settings, length: int, names: list[str], *, what: str = "", may_fail: list[str] | None = None
) -> Measurement:
    """Inputs made, contenders compiled, warm and checked against the truth.

    Args:
        report: Gets a check for each contender that can run here.
        layer: The layer.
        length: Prompt tokens.
        names: Contenders.
        what: Put before the names of the checks.
        may_fail: Contenders whose failure says nothing against the package.
    """
    chosen = {name: CONTENDERS[name] for name in select(names)}
    reasons = {name: contender.unavailable(layer) for name, contender in chosen.items()}
    able = {name: chosen[name] for name, reason in reasons.items() if reason is None}
    measurement = Measurement(make_problem(layer, length), able)
    measurement.prepare()
    for name, reason in reasons.items():
        if reason is None:
            result = measurement.results[name]
            found = "within its budget" if result.status == "ok" else f"{result.status}: {result.reason}"
            if name not in (may_fail or []) or result.status == "ok":
                report.check(f"{what}{words(length)} {name}", result.status == "ok", found)
        else:
            measurement.results[name] = Result("unavailable", reason)
    return measurement


def _time(report: Report, measured: dict[str, Measurement], started: float) -> None:
    """Rounds over all of them while the device is this stage's, saved after each; ``started`` is when it began."""
    report.figure(ready_s=time.monotonic() - started)
    right = {(what, name) for what, each in measured.items() for name in _right(each)}
    report.alone()
    for number in range(report.settings["repeats"]):
        with report.on_device():
            for measurement in measured.values():
                measurement.round(last=number == report.settings["repeats"] - 1)
        report.figure(layers={what: _rows(each) for what, each in measured.items()}, repeats=number + 1)
    lost = right - {(what, name) for what, each in measured.items() for name in _right(each)}
    reasons = "; ".join(f"{what} {name}: {measured[what].results[name].reason}" for what, name in sorted(lost))
    report.check("right to the end", right and not lost, reasons or f"{len(right)} times")


def _right(measurement: Measurement) -> list[str]:
    return [name for name, result in measurement.results.items() if result.status == "ok"]


def _rows(measurement: Measurement) -> dict[str, Any]:
    return {
        name: {
            "status": result.status,
            "reason": result.reason,
            "milliseconds": 1000 * statistics.median(result.samples) if result.samples else None,
            "samples_s": result.samples,
            "plan_s": statistics.median(result.plan_samples) if result.plan_samples else None,
            "error": result.error.largest if result.error else None,
            "budget": result.budget.largest if result.budget else None,
        }
        for name, result in measurement.results.items()
    }


def _speedup(dense: Result, ours: Result) -> float | None:
    pairs = zip(dense.samples, ours.samples, strict=False)
    found = [slow / fast for slow, fast in pairs]
    return statistics.median(found) if found else None


def _ms(result: Result) -> str:
    return f"{1000 * statistics.median(result.samples):.3g} ms" if result.samples else result.status


def _candidates(settings: dict[str, Any], size: int) -> list[str]:
    """What the shipped launch shape is compared with."""
    if settings["candidates"] is not None:
        return list(settings["candidates"])
    padded = next(padded for padded in tiles.CANDIDATES if size in tiles.head_sizes(padded))
    return [tiles.contender(padded, name) for name in tiles.CANDIDATES[padded]]


def _line(size: int, winner: str) -> str | None:
    """What to paste into the table of launch shapes."""
    for padded, candidates in tiles.CANDIDATES.items():
        for name, (_, tile) in candidates.items():
            if size in tiles.head_sizes(padded) and tiles.contender(padded, name) == winner:
                shipped = config_for(size, 2, 2, 90)
                return tiles.table_line(padded, replace(tile, block_m=shipped.block_m))
    return None


def _compile(jobs: list[tuple[Settings, str]]) -> dict[str, float | str]:
    """Compiles side by side, so that this process finds the kernels in Triton's cache on disk.

    Returns:
        Seconds of each, or what went wrong; the process that times them says so too.
    """
    workers = min(_WORKERS, os.cpu_count() or 1, len(jobs))
    if workers < 2:
        return {}
    found: dict[str, float | str] = {}
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        running = {f"d{layer.head_size} {name}": pool.submit(compile_one, layer, name) for layer, name in jobs}
        for name, future in running.items():
            error = future.exception()
            found[name] = future.result() if error is None else f"{type(error).__name__}: {str(error)[:300]}"
    return found


def compile_one(layer: Settings, name: str) -> float:
    """Runs a contender once on a short prompt; returns its seconds, which a compilation takes most of."""
    torch.set_num_threads(1)
    problem = make_problem(layer, _COMPILED_TOKENS)
    started = time.perf_counter()
    prepared = CONTENDERS[name].prepare(problem)
    prepared.plan()
    prepared.run()
    if layer.device.type == "cuda":
        torch.cuda.synchronize(layer.device)
    return time.perf_counter() - started
