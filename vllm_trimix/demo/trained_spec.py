"""Shapes and training settings of the trained retrieval models, validated; free of torch."""

from __future__ import annotations

from dataclasses import dataclass

MIN_RECORDS = 4
QUESTIONS = 6  # Of a training document.
_POSITIONS_MULTIPLE = 64


def repeats_of(records: int) -> int:
    """Records that a document states a second time."""
    return records // 4


def tokens_of(records: int, questions: int = 1) -> int:
    """Tokens of a document with its questions, BOS included and the last answer left out."""
    return 2 * (records + repeats_of(records)) + 3 * questions


@dataclass(frozen=True, kw_only=True)
class TrainedSpec:
    """What a trained model is and how it comes about.

    Attributes:
        keys: Words that can be keys, and as many that can be values.
        records: Of the longest documents it is trained on; it answers up to there, not beyond.
        learning_rate: AdamW's, after the warm-up; 100 steps from 0, and to 0 over the cool-down.
        batch: Documents of a step, fewer where they would exceed ``batch_tokens``.
        cool_down: Steps at documents of every length, after the longest were learnt.
        steps_limit: Training that takes longer is given up.
    """

    layers: int
    hidden_size: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate_size: int
    keys: int
    records: int
    learning_rate: float
    batch: int
    batch_tokens: int
    cool_down: int
    steps_limit: int

    def __post_init__(self) -> None:
        """Raises ValueError, naming the value, the limit and the fix."""
        if not MIN_RECORDS <= self.records <= self.keys:
            raise ValueError(
                f"records: {self.records} is outside {MIN_RECORDS}-{self.keys}, the keys of this size; "
                f"choose e.g. {self.keys * 3 // 4}"
            )
        if self.steps_limit < 1:
            raise ValueError(f"steps_limit: {self.steps_limit} is too few; choose at least 1")

    @property
    def max_positions(self) -> int:
        """Longest training document in tokens, rounded up."""
        return -(-(tokens_of(self.records, QUESTIONS) + 1) // _POSITIONS_MULTIPLE) * _POSITIONS_MULTIPLE


# fmt: off
SIZES = {
    # Minutes on one CPU core. Heads of 32 are the least that vLLM's CPU attention takes.
    "small": TrainedSpec(
        layers=4, hidden_size=64, heads=4, kv_heads=2, head_size=32, intermediate_size=128, keys=128, records=96,
        learning_rate=2e-3, batch=48, batch_tokens=6144, cool_down=250, steps_limit=6000,
    ),
    # An estimate for a GPU, documents of up to 4K tokens. Its training has never been run.
    "large": TrainedSpec(
        layers=8, hidden_size=256, heads=4, kv_heads=2, head_size=64, intermediate_size=512, keys=2048, records=1600,
        learning_rate=1e-3, batch=48, batch_tokens=65536, cool_down=1000, steps_limit=11000,
    ),
}
# fmt: on
