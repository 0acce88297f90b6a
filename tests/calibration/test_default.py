"""The shipped default of ``min_prompt_len`` against the runs it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_trimix.calibration.overlay import is_overlay
from vllm_trimix.config.entry import DEFAULT_MIN_PROMPT_LEN
from vllm_trimix.config.shallow import COMPILED_CPU_MIN_SEQ_LEN, DEFAULT_MIN_SEQ_LEN
from vllm_trimix.measurement.intervals import CONFIDENCE

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted(ROOT.glob("benchmarks/results/*/calibrate*.json"))


def test_the_default_comes_from_recorded_runs() -> None:
    if not OVERLAYS:
        pytest.skip("no calibrate*.json under benchmarks/results: no run of vllm-trimix calibrate is recorded yet")
    measured = []
    for path in OVERLAYS:
        assert is_overlay(path), f"{path} was not written by vllm-trimix calibrate"
        overlay = json.loads(path.read_text())
        samples = overlay["provenance"]["samples"]
        assert min(sample["confidence"] for sample in samples) >= CONFIDENCE, f"{path}: too few repeats"
        measured.append(overlay["min_prompt_len"])
    # Twice the largest, rounded up to a power of two.
    assert 1 << (2 * max(measured) - 1).bit_length() == DEFAULT_MIN_PROMPT_LEN


def test_dynamic_patterns_start_where_all_of_them_were_seen_to_pay() -> None:
    """On CPUs with the compiled kernel: at the shortest length measured, each was faster than the triangle alone."""
    result = json.loads((ROOT / "benchmarks/results/2026-11-21-cpu-dynamic/result.json").read_text())
    rows = {(row["config"], row["length"]): row["ttft_median_s"] for row in result["rows"]}
    assert min(length for _, length in rows) == COMPILED_CPU_MIN_SEQ_LEN
    dynamic = {config for config, _ in rows} - {"stock", "trimix"}
    assert len(dynamic) >= 2
    for config in dynamic:
        for length in {length for _, length in rows}:
            assert rows[config, length] < rows["trimix", length]


def test_elsewhere_the_default_is_the_published_crossing() -> None:
    """Seconds on an A100 (TriangleMix paper): the first length from which MInference pays on top, rounded up."""
    triangle = {32: 3.6, 48: 5.9, 64: 8.6, 80: 11.7, 96: 15.2, 112: 19.1, 128: 23.4}
    both = {32: 4.2, 48: 6.0, 64: 7.7, 80: 9.5, 96: 10.9, 112: 12.7, 128: 14.5}
    assert min(length for length in triangle if both[length] < triangle[length]) * 1024 == DEFAULT_MIN_SEQ_LEN
