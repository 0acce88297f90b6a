"""What the served stage measured: samples, ratios, the rows that are due, and the lines that say it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from vllm_trimix.measurement.intervals import median_interval

MODES = ("off", "triangle", "on")
"""Values of ``vllm_xargs.trimix``: stock's own path, the triangle, and the triangle with the pattern."""
# Between two engines that do the same work, in medians of few samples.
_NOISE = 0.02


@dataclass(frozen=True)
class Rule:
    """Which rows TRIMIX must count for a prompt that is alone in its engine.

    Attributes:
        chunk: Rows of a step.
        last_n: Dense last rows.
        dense_len: Up to this many tokens the triangle hides nothing.
        triangle_layers: How many layers are triangle.
        pattern_layers: How many layers have the pattern.
        block_size: Rows of the pattern's tiles; a chunk with fewer stays dense.
    """

    chunk: int
    last_n: int
    dense_len: int
    triangle_layers: int
    pattern_layers: int
    block_size: int

    def rows(self, mode: str, length: int) -> dict[str, int]:
        """Counters that one prompt moves, and by how much."""
        if mode == "off":
            return {"triangle": 0, "opt_out": length, "triangle_layer_rows": 0, "dynamic_layer_rows": 0}
        body = length - self.last_n if length > self.dense_len else 0
        pattern = 0
        for start in range(0, length, self.chunk):
            rows = min(start + self.chunk, length - self.last_n) - start
            pattern += rows if rows >= self.block_size else 0
        return {
            "triangle": body,
            "opt_out": 0,
            "triangle_layer_rows": body * self.triangle_layers,
            "dynamic_layer_rows": pattern * self.pattern_layers if mode == "on" else 0,
        }


def density(rows: Mapping[str, int]) -> float | None:
    """Keys that the pattern read as a share of those that dense attention would have read in their place."""
    causal = rows.get("keys_causal", 0)
    return rows["keys_read"] / causal if causal else None


@dataclass
class Results:
    """Samples as they come.

    Attributes:
        samples: One a request: engine, mode, length, round, ``ttft_s``, ``vllm_ttft_s``, density.
        between: Seconds between tokens by engine, a list a round.
        profiles: By mode.
    """

    samples: list[dict[str, Any]] = field(default_factory=list)
    between: dict[str, list[list[float]]] = field(default_factory=dict)
    profiles: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, engine: str, mode: str | None, length: int, number: int | str, answer: Mapping[str, Any]) -> None:
        """One request's answer; ``mode`` is None for stock."""
        self.samples.append(
            {
                "engine": engine,
                "mode": mode,
                "length": length,
                "round": number,
                "ttft_s": answer["ttft_s"],
                "vllm_ttft_s": answer["vllm_ttft_s"],
                "density": density(answer["rows"]),
            }
        )

    def ttft(self, engine: str, mode: str | None, length: int) -> float | None:
        """Median seconds to the first token, or None if there is no sample."""
        found = list(self._by_round(engine, mode, length).values())
        return statistics.median(found) if found else None

    def density(self, engine: str, length: int) -> float | None:
        """Of the pattern, in the median request."""
        found = [
            sample["density"]
            for sample in self.samples
            if (sample["engine"], sample["mode"], sample["length"]) == (engine, "on", length) and sample["density"]
        ]
        return statistics.median(found) if found else None

    def speedups(self, engine: str, mode: str, length: int) -> list[float]:
        """How many times faster than opted out, a number a round that has both."""
        off, this = (self._by_round(engine, each, length) for each in ("off", mode))
        return [off[number] / this[number] for number in off if number in this]

    def stock_ratios(self, engine: str, length: int) -> list[float]:
        """Opted-out requests of ``engine`` over stock's own, a number a round that has both."""
        off, stock = self._by_round(engine, "off", length), self._by_round("stock", None, length)
        return [off[number] / stock[number] for number in off if number in stock]

    def stock_lengths(self) -> list[int]:
        """Lengths that stock's own engine was asked."""
        return sorted({sample["length"] for sample in self.samples if sample["mode"] is None})

    def _by_round(self, engine: str, mode: str | None, length: int) -> dict[Any, float]:
        return {
            sample["round"]: sample["ttft_s"]
            for sample in self.samples
            if (sample["engine"], sample["mode"], sample["length"]) == (engine, mode, length)
        }

    def between_ms(self, engine: str) -> float | None:
        """Median milliseconds between two tokens."""
        found = [statistics.median(times) for times in self.between.get(engine, []) if times]
        return 1000 * statistics.median(found) if found else None


def of(found: list[float]) -> dict[str, Any] | None:
    """Median and interval of some ratios; None if there are none."""
    if not found:
        return None
    return {"median": statistics.median(found), "interval": list(median_interval(found)), "samples": found}


def targets(results: Results, engines: list[str], *, longest: int, at_density: float, short: list[int]) -> list[Any]:
    """What was promised, what was measured, and whether that is met; None where nothing was measured.

    Args:
        results: So far.
        engines: TRIMIX engines, the one of the largest chunk first.
        longest: Tokens of the longest prompt.
        at_density: Up to which density of the pattern its promise holds.
        short: Lengths at which the triangle must not be slower.
    """
    first, *rest = engines
    found = []
    for mode, least in (("triangle", 1.45), ("on", 2.5)):
        seen = of(results.speedups(first, mode, longest))
        dense = results.density(first, longest) if mode == "on" else None
        line = {"target": f"{words(longest)} {mode}: at least {least}x", "seen": seen, "density": dense}
        comparable = seen is not None and (mode != "on" or (dense is not None and dense <= at_density))
        found.append({**line, "met": seen["median"] >= least if comparable and seen is not None else None})
    whole = of(results.speedups(first, "triangle", longest))
    for other in rest:
        seen = of(results.speedups(other, "triangle", longest))
        share = seen["median"] / whole["median"] if seen and whole else None
        # Unchunked prompts need a step as long as the prompt, which fits beside no other engine: the pair stands here.
        found.append({"target": f"gain of {other} as a share of {first}'s", "seen": share, "met": None})
    for length in short:
        seen = of(results.speedups(first, "triangle", length))
        met = seen["interval"][1] >= 1 if seen else None
        found.append({"target": f"never slower at {length} tokens", "seen": seen, "met": met})
    for length in results.stock_lengths():
        seen = of(results.stock_ratios(first, length))
        met = abs(seen["median"] - 1) <= _NOISE if seen else None
        found.append({"target": f"opted out as fast as stock's engine, {words(length)}", "seen": seen, "met": met})
    mine, stock = results.between_ms(first), results.between_ms("stock")
    share = mine / stock if mine and stock else None
    met = None if share is None else share <= 1 + _NOISE
    found.append({"target": "between tokens: as fast as stock's engine", "seen": share, "met": met})
    return found


def lines(results: Results, engines: list[str], lengths: list[int]) -> str:
    """The summary: times by length, what is faster by how much, then what must be equal."""
    found = []
    for number, engine in enumerate(engines):
        for length in lengths:
            off = results.ttft(engine, "off", length)
            if off is None:
                continue
            parts = [f"stock {off:.3g} s"]
            for mode in MODES[1:]:
                speedup, seconds = of(results.speedups(engine, mode, length)), results.ttft(engine, mode, length)
                if speedup is None or seconds is None:
                    continue
                dense = results.density(engine, length) if mode == "on" else None
                label = mode if dense is None else f"pattern (density {dense:.2f})"
                parts.append(f"{label} {seconds:.3g} s {speedup['median']:.2f}x")
            where = words(length) if number == 0 else f"{engine} {words(length)}"
            found.append(f"{where}: {', '.join(parts)}")
    for length in results.stock_lengths():
        ratio = of(results.stock_ratios(engines[0], length))
        if ratio is not None:
            same = "as fast as" if abs(ratio["median"] - 1) <= _NOISE else "NOT as fast as"
            found.append(f"opted out {same} stock's engine ({ratio['median']:.3f} at {words(length)})")
    mine, stock = results.between_ms(engines[0]), results.between_ms("stock")
    if mine is not None and stock is not None:
        found.append(f"between tokens {mine:.2f} ms, stock {stock:.2f} ({mine / stock:.3f})")
    return "; ".join(found)


def words(length: int) -> str:
    """Tokens as people say them."""
    return f"{length // 1024}K" if length % 1024 == 0 else str(length)
