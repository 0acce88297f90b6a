"""Overlays of ``vllm-trimix calibrate`` in a page: the same table as the command printed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.reading import report
from vllm_trimix.calibration import overlay
from vllm_trimix.calibration import report as calibration_report
from vllm_trimix.calibration.break_even import DENSE, DYNAMIC, TRIANGLE, Comparison, Row

TRIANGLE_ROWS = [
    Row(512, (0.1, 0.11, 0.1, 0.1, 0.1, 0.1), (0.1, 0.1, 0.1, 0.11, 0.1, 0.1), is_control=True),
    Row(1024, (0.3, 0.31, 0.3, 0.3, 0.3, 0.32), (0.31, 0.33, 0.31, 0.31, 0.32, 0.33)),
    Row(2048, (0.9, 0.91, 0.9, 0.9, 0.92, 0.9), (0.6, 0.6, 0.61, 0.6, 0.6, 0.6)),
]
DYNAMIC_ROWS = [
    Row(2048, (0.6,) * 6, (0.7,) * 6, names=(TRIANGLE, DYNAMIC), density=0.75),
    Row(4096, (1.9,) * 6, (2.0,) * 6, names=(TRIANGLE, DYNAMIC)),
]


def _overlay() -> dict[str, Any]:
    provenance = {
        "source": overlay.SOURCE,
        "date": "2026-01-02",
        "hardware": "Some CPU",
        "warnings": ["the machine was not quiet"],
        "samples": [row.as_json() for row in TRIANGLE_ROWS],
        "dynamic_samples": [row.as_json() for row in DYNAMIC_ROWS],
    }
    return {"layers": "2-3", "min_prompt_len": 2048, "shallow": "dense", "provenance": provenance}


def _write(folder: Path, overlay: object) -> Path:
    path = folder / "trimix-model.json"
    path.write_text(json.dumps(overlay))
    return path


def test_the_table_is_the_commands_own(tmp_path: Path) -> None:
    page = report(_write(tmp_path, _overlay()), output=tmp_path / "page.html")
    triangle, dynamic, settings = page.tables[:3]
    for table, rows in ((triangle, TRIANGLE_ROWS), (dynamic, DYNAMIC_ROWS)):
        comparison = Comparison(*rows[0].names, 0)
        printed = [calibration_report.header(comparison, 6), *(calibration_report.format_row(row) for row in rows)]
        assert ["".join(line).replace(" ", "") for line in table] == [line.replace(" ", "") for line in printed]
    assert settings == [["layers", "2-3"], ["min_prompt_len", "2048"], ["shallow", "dense"]]
    assert "Break-even of triangle over dense: 2048 tokens" in page.text
    assert "No break-even of dynamic over triangle up to 4096 tokens." in page.text
    assert "Warning: the machine was not quiet" in page.text
    assert "Some CPU · 2026-01-02" in page.text


def test_the_table_is_as_wide_as_before() -> None:
    assert calibration_report.header(Comparison(DENSE, TRIANGLE, 0), 6) == (
        " tokens     dense (s)  triangle (s)   ratio    95% interval  verdict"
    )
    assert calibration_report.format_row(TRIANGLE_ROWS[2]) == (
        "   2048        0.9000        0.6000   0.667     0.652-0.678  faster"
    )
    assert calibration_report.format_row(DYNAMIC_ROWS[0]) == (
        "   2048        0.6000        0.7000   1.167     1.167-1.167    0.750  slower"
    )
    assert calibration_report.format_row(DYNAMIC_ROWS[1]).endswith("        -  slower")


def _changed(**changes: Any) -> dict[str, Any]:
    overlay = copy.deepcopy(_overlay())
    del overlay["provenance"]["dynamic_samples"]
    overlay["provenance"]["samples"][1].update(changes)
    return overlay


@pytest.mark.parametrize(
    "overlay",
    [
        _changed(dense_s=[]),
        _changed(dense_s=["a"]),
        _changed(dense_s=[0.0] * 6),
        _changed(dense_s=[float("nan")] * 6),
        _changed(other_s=[1.0]),
        _changed(length=None),
        _changed(density={}),
        {**_overlay(), "provenance": {"source": overlay.SOURCE, "samples": [3]}},
        {**_overlay(), "provenance": {"source": overlay.SOURCE, "samples": {"a": 1}}},
    ],
)
def test_a_changed_overlay_is_shown_as_it_is(overlay: dict[str, Any], tmp_path: Path) -> None:
    page = report(_write(tmp_path, overlay), output=tmp_path / "page.html")
    assert "Break-even" not in page.text
    assert [["layers", "2-3"], ["min_prompt_len", "2048"], ["shallow", "dense"]] in page.tables
