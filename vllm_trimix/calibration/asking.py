"""Asks an engine for the timings of a break-even, and makes sure that they are of what they say."""

from __future__ import annotations

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Sequence

from vllm_trimix.calibration import break_even, report
from vllm_trimix.calibration.break_even import Comparison, Row
from vllm_trimix.config.entry import Resolved
from vllm_trimix.measurement.engine_process import EngineProcess

_LOG_SECONDS = 10.0
# What the log says once rows of a variant were computed.
_RAN = {break_even.TRIANGLE: r"TRIMIX rows: triangle=[1-9]", break_even.DYNAMIC: r"dynamic_layer_rows=[1-9]"}
_KEYS = re.compile(r"TRIMIX rows: .* keys_read=(\d+) keys_causal=(\d+) ")
# Until what a row of the table ran is in the log.
_SETTLE_SECONDS = 1.2

Say = Callable[[str], None]
"""Tells the user how it goes."""


def comparisons(resolved: Resolved, shallow_dense_len: int | None) -> list[Comparison]:
    """What is measured, in order: the triangle over dense, then the shallow layers' pattern over the triangle alone.

    Args:
        resolved: What runs.
        shallow_dense_len: Longest prompt of which the shallow pattern has no row, in tokens; None without a pattern.
    """
    found = []
    if resolved.layers:
        found.append(Comparison(break_even.DENSE, break_even.TRIANGLE, resolved.triangle.dense_len))
    if shallow_dense_len is not None:
        baseline = break_even.TRIANGLE if resolved.layers else break_even.DENSE
        found.append(Comparison(baseline, break_even.DYNAMIC, shallow_dense_len))
    return found


def measure_all(
    engine: EngineProcess,
    compared: Sequence[Comparison],
    resolved: Resolved,
    *,
    longest: int,
    repeats: int,
    left: Callable[[], float],
    say: Say,
) -> dict[str, list[Row]]:
    """The rows of each comparison, by its candidate; the time that is left is shared out evenly."""
    measured = {}
    for number, comparison in enumerate(compared, 1):
        reserved = left() * (1 - 1 / (len(compared) - number + 1))
        measured[comparison.candidate] = measure(
            engine,
            comparison,
            resolved,
            longest=longest,
            repeats=repeats,
            left=functools.partial(_before, left, reserved),
            say=say,
        )
    return measured


def measure(
    engine: EngineProcess,
    comparison: Comparison,
    resolved: Resolved,
    *,
    longest: int,
    repeats: int,
    left: Callable[[], float],
    say: Say,
) -> list[Row]:
    """Measures all lengths and prints a line for each.

    Raises:
        ValueError: No row ran the pattern.
        EngineDied: The engine ended.
    """
    say(report.announcement(comparison, resolved))
    print(report.header(comparison, repeats), flush=True)
    is_dynamic = comparison.candidate == break_even.DYNAMIC
    checked = False
    keys_before = _keys(engine.log)
    densities: dict[int, float | None] = {}

    def on_row(row: Row) -> None:
        nonlocal checked, keys_before
        if is_dynamic:
            # Written some time after the rows that it counts.
            time.sleep(_SETTLE_SECONDS)
            keys = _keys(engine.log)
            read, causal = (now - before for now, before in zip(keys, keys_before, strict=True))
            keys_before = keys
            densities[row.length] = read / causal if causal else None
            row = dataclasses.replace(row, density=densities[row.length])
        print(report.format_row(row), flush=True)
        if not row.is_control and not checked:
            if engine.wait_for_log(_RAN[comparison.candidate], _LOG_SECONDS) is None:
                raise ValueError(
                    f"no row of a prompt of {row.length} tokens ran {report.what(comparison.candidate, resolved)}; see "
                    "vllm-trimix doctor"
                )
            checked = True

    def ask(length: int, seed: int, variant: str) -> float:
        return float(
            engine.ask({"length": length, "seed": seed, "extra_args": break_even.VARIANTS[variant]})["seconds"]
        )

    rows = break_even.measure(ask, comparison, longest=longest, repeats=repeats, left=left, on_row=on_row, say=say)
    return [dataclasses.replace(row, density=densities.get(row.length)) for row in rows]


def _keys(log: str) -> tuple[int, int]:
    """Keys that dynamic patterns read so far, and keys that they could have read."""
    found = [(int(read), int(causal)) for read, causal in _KEYS.findall(log)]
    return sum(read for read, _ in found), sum(causal for _, causal in found)


def _before(left: Callable[[], float], reserved: float) -> float:
    """Seconds left of the time before that which is kept for later."""
    return left() - reserved
