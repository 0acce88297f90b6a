"""Metrics score as published, and a sample's digest is of all that decides its score."""

from __future__ import annotations

import dataclasses

import pytest

from vllm_trimix.evaluation.sample import METRICS, Measure, Sample


@pytest.mark.parametrize(
    ("metric", "answer", "references", "score"),
    [
        ("all", " It is ABC and def.", ("abc", "DEF", "ghi", "jkl"), 0.5),
        ("all", "", ("a",), 0.0),
        ("any", "in Paris, I think", ("London", "paris"), 1.0),
        ("any", "nowhere", ("London", "paris"), 0.0),
        ("first_number", " 71432. Remember 5", ("71432",), 1.0),
        ("first_number", " 714325", ("71432",), 0.0),
        ("first_number", "12 71432", ("71432",), 0.0),
        ("first_number", "none", ("71432",), 0.0),
        ("first_word", " 4821 </s>", ("4821",), 1.0),
        ("first_word", " amber 4821", ("4821",), 0.0),
        ("first_word", "", ("4821",), 0.0),
    ],
)
def test_metrics(metric: str, answer: str, references: tuple[str, ...], score: float) -> None:
    assert METRICS[metric](answer, references) == score


SAMPLE = Sample("vt", 64, 3, (1, 2, 3), ("a",), depth=0.25)


def test_names_and_digests() -> None:
    assert SAMPLE.name == "vt/64@0.25/3"
    assert dataclasses.replace(SAMPLE, task="other").digest == SAMPLE.digest
    for change in (
        {"prompt": (1, 2, 4)},
        {"references": ("b",)},
        {"metric": "any"},
        {"max_tokens": 33},
        {"measure": Measure.AGREEMENT},
    ):
        assert dataclasses.replace(SAMPLE, **change).digest != SAMPLE.digest, change
