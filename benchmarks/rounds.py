"""Measured rounds on disk, one JSON line each, and what follows from them.

A round is one length and concurrency, asked of every configuration one right after the other. Only whole rounds are
kept, so that a comparison never mixes two runs of the benchmark.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.configurations import IDEAL, STOCK
from vllm_trimix.config import Resolved
from vllm_trimix.intervals import bootstrap_interval

Round = dict[str, Any]


class Rounds:
    """The rounds of one output folder.

    Attributes:
        done: Rounds measured so far, in order.
    """

    def __init__(self, directory: Path, settings: dict[str, Any]) -> None:
        """Reads what an earlier run left.

        Raises:
            ValueError: The folder holds rounds of other settings, or of another machine.
        """
        self._file = directory / "rounds.jsonl"
        self._settings = directory / "settings.json"
        self.done: list[Round] = []
        if self._file.exists() and self._settings.exists():
            earlier = json.loads(self._settings.read_text())
            differing = sorted(key for key in {*earlier, *settings} if earlier.get(key) != settings.get(key))
            if differing:
                key = differing[0]
                raise ValueError(
                    f"--output: {directory} holds rounds of another run ({key}: {earlier.get(key)!r} there, "
                    f"{settings.get(key)!r} now); name another folder, or delete this one"
                )
            # A run that was killed while writing leaves half a line.
            lines = [line for line in self._file.read_text().splitlines() if line.endswith("}")]
            self.done = [json.loads(line) for line in lines]
            self._file.write_text("".join(f"{line}\n" for line in lines))
        self._settings.write_text(json.dumps(settings, indent=1) + "\n")

    def has(self, length: int, concurrency: int, repeat: int) -> bool:
        """Whether this round is there."""
        return any((r["length"], r["concurrency"], r["repeat"]) == (length, concurrency, repeat) for r in self.done)

    def add(self, measured: Round) -> None:
        """Keeps a round."""
        self.done.append(measured)
        with open(self._file, "a") as file:
            file.write(json.dumps(measured) + "\n")


def summarise(rounds: Sequence[Round], resolved: dict[str, Resolved | None]) -> list[dict[str, Any]]:
    """One row per length, concurrency and configuration.

    Args:
        rounds: As measured.
        resolved: Settings of each configuration, None for stock; the floor is that of every configuration with its
            layers.

    Returns:
        Rows with ``captured_saving`` (T_stock - T) / (T_stock - T_ideal) where prompts are long enough to be sparse,
        and ``pair_bound``: the saving if a triangle layer's attention cost what its visible pairs cost.
    """
    rows = []
    for length, concurrency in dict.fromkeys((r["length"], r["concurrency"]) for r in rounds):
        mine = [r["measurements"] for r in rounds if (r["length"], r["concurrency"]) == (length, concurrency)]
        rows += [
            {"config": name, "length": length, "concurrency": concurrency, **_row(mine, name, resolved, length)}
            for name in resolved
        ]
    return rows


def _row(
    rounds: list[dict[str, dict[str, Any]]], name: str, resolved: dict[str, Resolved | None], length: int
) -> dict[str, Any]:
    def median(config: str, key: str, of: list[dict[str, dict[str, Any]]]) -> float:
        return statistics.median(r[config][key] for r in of)

    def interval(statistic: Any) -> list[float]:
        return [round(value, 5) for value in bootstrap_interval(statistic, rounds)]

    def ratio(key: str, of: list[dict[str, dict[str, Any]]]) -> float:
        return median(name, key, of) / median(STOCK, key, of)

    def captured(of: list[dict[str, dict[str, Any]]]) -> float:
        stock = median(STOCK, "ttft_s", of)
        possible = stock - median(IDEAL, "ttft_s", of)
        return (stock - median(name, "ttft_s", of)) / possible if possible else 0.0

    row = {
        "repeats": len(rounds),
        "ttft_median_s": median(name, "ttft_s", rounds),
        "ttft_ci95_s": interval(lambda of: median(name, "ttft_s", of)),
        "ratio_to_stock": round(ratio("ttft_s", rounds), 4),
        "ratio_ci95": interval(lambda of: ratio("ttft_s", of)),
        "captured_saving": None,
        "captured_ci95": None,
        "pair_bound": None,
        "itl_median_s": None,
        "itl_ratio_to_stock": None,
        "itl_ratio_ci95": None,
        "throughput_tokens_s": median(name, "throughput_tokens_s", rounds),
        "peak_memory_bytes": max(r[name]["peak_memory_bytes"] for r in rounds),
        "gpu_memory_bytes": rounds[-1][name]["gpu_memory_bytes"],
        "idle_cpu": max(r[name]["idle_cpu"] for r in rounds),
    }
    if rounds[0][name]["itl_s"] is not None:
        row["itl_median_s"] = median(name, "itl_s", rounds)
        row["itl_ratio_to_stock"] = round(ratio("itl_s", rounds), 4)
        row["itl_ratio_ci95"] = interval(lambda of: ratio("itl_s", of))
    settings, floor = resolved[name], resolved.get(IDEAL)
    if name == IDEAL or settings is None or not settings.layers or length < settings.min_prompt_len:
        return row
    row["pair_bound"] = round(1 - 2 * settings.triangle.visible_pairs(length) / (length * (length + 1)), 4)
    if floor is not None and floor.layers == settings.layers:
        row["captured_saving"] = round(captured(rounds), 4)
        row["captured_ci95"] = interval(captured)
    return row
