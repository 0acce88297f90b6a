"""An overlay of ``vllm-trimix calibrate`` in words and tables, as the command itself showed it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_trimix.calibration import break_even, report
from vllm_trimix.calibration.break_even import Comparison, Row
from vllm_trimix.calibration.overlay import SOURCE
from vllm_trimix.reporting.facts import BLOCKS, KEYS
from vllm_trimix.reporting.tables import Table, tables_of

_SAMPLES = ("samples", "dynamic_samples")


@dataclass(frozen=True)
class View:
    """What a JSON file says, for a reader.

    Attributes:
        lines: Sentences.
        tables: Below them.
    """

    lines: list[str]
    tables: list[Table]


def view(value: Any) -> View:
    """The view of a JSON file without Markdown; of an overlay with its break-even, of any other one plain tables."""
    try:
        measured = _measured(value)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError):
        # No overlay of ours, or one that somebody changed: the tables show it as it is.
        measured = []
    if not measured:
        return View([], tables_of(value, without=(*BLOCKS, *KEYS)))
    lines = [_verdict(rows) for rows in measured]
    lines += [f"Warning: {warning}" for warning in value["provenance"].get("warnings", ())]
    settings = {key: item for key, item in value.items() if key != "provenance"}
    return View(lines, [*(_table(rows) for rows in measured), *tables_of(settings)])


def _measured(value: Any) -> list[list[Row]]:
    provenance = value["provenance"]
    if provenance["source"] != SOURCE:
        return []
    lists = [[_row(sample) for sample in provenance[key]] for key in _SAMPLES if provenance.get(key)]
    if any(row.names != rows[0].names for rows in lists for row in rows):
        raise ValueError("samples of several comparisons in one list")
    return lists


def _row(sample: dict[str, Any]) -> Row:
    """The inverse of ``Row.as_json``."""
    baseline, candidate = (key.removesuffix("_s") for key in sample if key.endswith("_s"))
    slow, fast = (tuple(float(seconds) for seconds in sample[f"{name}_s"]) for name in (baseline, candidate))
    if len(slow) != len(fast) or not all(0 < seconds < math.inf for seconds in (*slow, *fast)):
        raise ValueError("timings that no clock gives")
    density = sample.get("density")
    row = Row(
        int(sample["length"]),
        slow,
        fast,
        is_control=sample["verdict"] == "same code",
        names=(baseline, candidate),
        density=None if density is None else float(density),
    )
    # Reads all figures, so that what is wrong shows here.
    report.cells(row)
    return row


def _comparison(rows: Sequence[Row]) -> Comparison:
    return Comparison(*rows[0].names, max((row.length for row in rows if row.is_control), default=0))


def _verdict(rows: Sequence[Row]) -> str:
    found, (baseline, candidate) = break_even.break_even(rows), rows[0].names
    if found is None:
        return f"No break-even of {candidate} over {baseline} up to {rows[-1].length} tokens."
    return (
        f"Break-even of {candidate} over {baseline}: {found} tokens; not slower at any measured length from there on."
    )


def _table(rows: Sequence[Row]) -> Table:
    comparison = _comparison(rows)
    return Table(
        f"Time to first token, {comparison.candidate} over {comparison.baseline}",
        report.columns(comparison, len(rows[0].baseline)),
        [report.cells(row) for row in rows],
    )
