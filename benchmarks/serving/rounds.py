"""Measured rounds on disk, one JSON line each, and what follows from them.

A round is one length and concurrency, asked of every configuration one right after the other. Only whole rounds are
kept, so that a comparison never mixes two runs of the benchmark.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.serving.configurations import IDEAL, STOCK
from vllm_trimix.config.entry import Resolved
from vllm_trimix.measurement.intervals import interval_confidence, median_interval

Round = dict[str, Any]
KEY_COUNTERS = ("dynamic_layer_rows", "keys_read", "keys_causal")


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
        Rows. Ratios and savings are medians over rounds of what each round gives, so that drift of the machine between
        rounds cancels. ``captured_saving`` is (T_stock - T) / (T_stock - T_ideal) where prompts are long enough to be
        sparse, ``pair_bound`` the saving if a triangle layer's attention cost what its visible pairs cost. ``density``
        is the share of the keys before them that a dynamic pattern's rows read, over all rounds, ``dynamic_share`` the
        share of the prompt rows in its layers that were its own, and not dense.
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
    def values(config: str, key: str) -> list[float]:
        return [measured[config][key] for measured in rounds]

    def paired(statistic: Callable[[float, float, float], float]) -> dict[str, Any]:
        """Median and interval of a figure that each round gives."""
        found = list(map(statistic, values(STOCK, "ttft_s"), values(name, "ttft_s"), values(floor_name, "ttft_s")))
        return {"median": round(statistics.median(found), 4), "ci95": [round(v, 4) for v in median_interval(found)]}

    settings, floor = resolved[name], resolved.get(IDEAL)
    floor_name = STOCK if floor is None else IDEAL
    ratio = paired(lambda stock, mine, _: mine / stock)
    ttfts = values(name, "ttft_s")
    row = {
        "repeats": len(rounds),
        "confidence": round(interval_confidence(len(rounds)), 4),
        "ttft_median_s": statistics.median(ttfts),
        "ttft_ci95_s": list(median_interval(ttfts)),
        "ttft_mean_s": round(statistics.fmean(ttfts), 6),
        "ratio_to_stock": ratio["median"],
        "ratio_ci95": ratio["ci95"],
        "captured_saving": None,
        "captured_ci95": None,
        "pair_bound": None,
        "itl_median_s": None,
        "itl_ratio_to_stock": None,
        "itl_ratio_ci95": None,
        "density": None,
        "dynamic_share": None,
        "throughput_tokens_s": statistics.median(values(name, "throughput_tokens_s")),
        "peak_memory_bytes": max(values(name, "peak_memory_bytes")),
        "gpu_memory_bytes": rounds[-1][name]["gpu_memory_bytes"],
        "idle_cpu": max(values(name, "idle_cpu")),
    }
    if rounds[0][name]["itl_s"] is not None:
        itls = values(name, "itl_s")
        ratios = [mine / stock for mine, stock in zip(itls, values(STOCK, "itl_s"), strict=True)]
        row["itl_median_s"] = statistics.median(itls)
        row["itl_ratio_to_stock"] = round(statistics.median(ratios), 4)
        row["itl_ratio_ci95"] = [round(value, 4) for value in median_interval(ratios)]
    if settings is not None and settings.shallow is not None and name != IDEAL:
        rows, read, causal = (sum(values(name, key)) for key in KEY_COUNTERS)
        row["density"] = round(read / causal, 4) if causal else None
        requests = sum(len(measured[name]["ttfts_s"]) for measured in rounds)
        row["dynamic_share"] = round(rows / (requests * length * len(settings.shallow.layers)), 4)
        # The floor has no pattern in the shallow layers: nothing to compare with.
        return row
    if name == IDEAL or settings is None or not settings.layers or length < settings.min_prompt_len:
        return row
    row["pair_bound"] = round(1 - 2 * settings.triangle.visible_pairs(length) / (length * (length + 1)), 4)
    if floor is not None and floor.shallow is None and floor.layers == settings.layers:
        saving = paired(lambda stock, mine, ideal: (stock - mine) / (stock - ideal) if stock != ideal else 0.0)
        row["captured_saving"], row["captured_ci95"] = saving["median"], saving["ci95"]
    return row
