"""What ``vllm-trimix calibrate`` says: tables, verdicts and what makes them doubtful."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence

from vllm_trimix.calibration import break_even
from vllm_trimix.calibration.break_even import Comparison, Row
from vllm_trimix.config.entry import Resolved
from vllm_trimix.config.layers import format_layers
from vllm_trimix.measurement.intervals import CONFIDENCE, interval_confidence

# Of the columns before the verdict, in letters.
_WIDTHS = (7, 14, 14, 8, 16, 9)


def announcement(comparison: Comparison, resolved: Resolved) -> str:
    """What is compared, in which layers."""
    if comparison.candidate == break_even.TRIANGLE:
        return (
            f"layers {format_layers(resolved.layers)} of {resolved.num_layers} run the triangle (n_init "
            f"{resolved.n_init}, n_local {resolved.n_local}, last_n {resolved.last_n}), from {resolved.source}"
        )
    assert resolved.shallow is not None
    shallow = resolved.shallow
    return (
        f"layers {format_layers(shallow.layers)} of {resolved.num_layers} run {shallow.label} (last_n "
        f"{shallow.last_n}), from {shallow.source}; compared with {than(comparison)}"
    )


def what(candidate: str, resolved: Resolved) -> str:
    """A variant in words."""
    if candidate == break_even.TRIANGLE or resolved.shallow is None:
        return "the triangle"
    return resolved.shallow.label


def than(comparison: Comparison) -> str:
    """What a candidate is compared with, in words."""
    return "dense" if comparison.baseline == break_even.DENSE else "the triangle with dense shallow layers"


def columns(comparison: Comparison, repeats: int) -> list[str]:
    """The table's columns, the verdict last."""
    level = f"{min(interval_confidence(repeats), CONFIDENCE):.0%} interval"
    seconds = [f"{name} (s)" for name in (comparison.baseline, comparison.candidate)]
    density = ["density"] if comparison.candidate == break_even.DYNAMIC else []
    return ["tokens", *seconds, "ratio", level, *density, "verdict"]


def cells(row: Row) -> list[str]:
    """One row of the table."""
    low, high = row.interval
    seconds = [f"{statistics.median(values):.4f}" for values in (row.baseline, row.candidate)]
    density = []
    if row.names[1] == break_even.DYNAMIC:
        density = ["-" if row.density is None else f"{row.density:.3f}"]
    return [str(row.length), *seconds, f"{row.ratio:.3f}", f"{low:.3f}-{high:.3f}", *density, row.verdict]


def header(comparison: Comparison, repeats: int) -> str:
    """The table's first line."""
    return _line(columns(comparison, repeats))


def format_row(row: Row) -> str:
    """One line of the table."""
    return _line(cells(row))


def _line(texts: Sequence[str]) -> str:
    *figures, last = texts
    return "".join(f"{text:>{width}}" for text, width in zip(figures, _WIDTHS, strict=False)) + f"  {last}"


def verdict(comparison: Comparison, resolved: Resolved, length: int) -> str:
    """What a break-even means."""
    return (
        f"break-even: {length} tokens. From there on {what(comparison.candidate, resolved)} was not slower than "
        f"{than(comparison)} at any measured length."
    )


def cautions(rows: Sequence[Row]) -> list[str]:
    """What makes the result doubtful, in sentences."""
    found = []
    noisy = [row for row in rows if row.spread > break_even.LARGE_SPREAD]
    if noisy:
        worst = max(noisy, key=lambda row: row.spread)
        found.append(
            f"the machine was not quiet: {worst.names[0]} times of one length differ by up to {worst.spread:.0%} "
            f"({worst.length} tokens); stop what else runs and measure again"
        )
    for shorter, longer in itertools.pairwise(rows):
        if statistics.median(longer.baseline) < statistics.median(shorter.baseline):
            found.append(
                f"the machine's speed changed: {longer.length} tokens took less time than {shorter.length}; "
                "stop what else runs and measure again"
            )
            break
    controls = [row for row in rows if row.is_control and not row.interval[0] <= 1 <= row.interval[1]]
    if controls:
        found.append(
            f"at {controls[0].length} tokens both variants ran the same code, yet their ratio was "
            f"{controls[0].ratio:.3f}: the timings are biased by about that much"
        )
    if rows and rows[0].confidence < CONFIDENCE:
        found.append(
            f"{len(rows[0].baseline)} repeats give an interval of {rows[0].confidence:.0%} only; 95% needs 6 or more"
        )
    return found


def stays_dense(rows: Sequence[Row], resolved: Resolved) -> str:
    """Why the overlay turns the dynamic pattern off."""
    name = what(break_even.DYNAMIC, resolved)
    if not rows:
        return f"--budget was over before {name} was measured: the overlay leaves the shallow layers dense"
    return f"{name} has no break-even up to {rows[-1].length} tokens: the overlay leaves the shallow layers dense"


def no_break_even(rows: Sequence[Row], candidate: str, resolved: Resolved) -> str:
    """Why nothing was written."""
    real = [row for row in rows if not row.is_control]
    if not real:
        return (
            "no break-even: --budget was over before a prompt was measured that the pattern shortens. Nothing written."
        )
    return (
        f"no break-even up to {real[-1].length} tokens: {what(candidate, resolved)} is not proven to be as fast as "
        "dense there. Nothing written. Allow longer prompts (--max-length, --budget), or serve without TRIMIX."
    )


def method(repeats: int) -> str:
    """How it was measured, for the overlay."""
    return (
        "time to first token of single requests of random tokens without prefix caching, two variants in turn on one "
        f"engine, {repeats} pairs per length after a warm-up; the smallest measured length from which on the "
        "order-statistic interval of the median paired ratio ends at or below 1. samples: triangle over opted-out "
        "dense, for min_prompt_len; dynamic_samples: the shallow pattern over the triangle alone (over dense where "
        "there is no triangle), every chunk sparse, for shallow.min_seq_len"
    )
