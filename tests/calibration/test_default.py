"""The shipped default of ``min_prompt_len`` against the runs it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vllm_trimix.calibration import is_overlay
from vllm_trimix.config import DEFAULT_MIN_PROMPT_LEN
from vllm_trimix.intervals import CONFIDENCE

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
