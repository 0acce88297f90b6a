"""What is asked and how an answer is scored: one prompt of one task."""

from __future__ import annotations

import functools
import hashlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from vllm_trimix.evaluation import forms

NUM_LOGPROBS = 20
"""Likeliest tokens whose probabilities are compared; as many as vLLM's server gives by default."""


class Measure(StrEnum):
    """What a sample measures."""

    ANSWER = "answer"
    """A greedy answer, scored against references: 0 to 1, higher is better."""
    PERPLEXITY = "perplexity"
    """The negative log-likelihood of the prompt's own tokens, in nats a token: lower is better."""
    AGREEMENT = "agreement"
    """A greedy answer and its token distributions, scored against the dense ones: 0 to 1, higher is better."""


@dataclass(frozen=True)
class Sample:
    """A prompt.

    Attributes:
        task: E.g. ``niah_single_1``.
        length: Nominal length in tokens; prompt and answer together are at most that.
        index: Number among those of its task and length (and depth).
        prompt: Token ids, special tokens included.
        references: Right answers, as ``metric`` takes them; empty where none is needed.
        metric: Key of ``METRICS``.
        max_tokens: Of the answer.
        measure: What is measured.
        depth: Where in the document the answer lies, 0 to 1; None where that isn't varied.
        source: Where the data comes from, e.g. ``lm-eval 0.4.13`` or ``own``.
        comparable: Whether scores may be held against published ones of this task.
        thought_end: What ends the thought that the answer begins with; empty where it begins with none.
        keeps_tokens: Whether the answer's tokens are kept, to be held against stock's.
    """

    task: str
    length: int
    index: int
    prompt: tuple[int, ...]
    references: tuple[str, ...] = ()
    metric: str = "all"
    max_tokens: int = 32
    measure: Measure = Measure.ANSWER
    depth: float | None = None
    source: str = "own"
    comparable: bool = False
    thought_end: str = ""
    keeps_tokens: bool = False

    @property
    def name(self) -> str:
        """Tells it from every other sample of a suite."""
        depth = "" if self.depth is None else f"@{self.depth:g}"
        return f"{self.task}/{self.length}{depth}/{self.index}"

    @functools.cached_property
    def digest(self) -> str:
        """A hash of all that decides the answer and its score."""
        content: tuple[object, ...] = (self.prompt, self.references, self.metric, self.max_tokens, str(self.measure))
        content += (self.thought_end,) if self.thought_end else ()
        content += (self.keeps_tokens,) if self.keeps_tokens else ()
        return hashlib.sha256(repr(content).encode()).hexdigest()[:16]

    def spoken(self, answer: str) -> str:
        """What an answer says behind its thought; nothing where that doesn't end."""
        if not self.thought_end:
            return answer
        return answer.rpartition(self.thought_end)[2] if self.thought_end in answer else ""


def _all(answer: str, references: tuple[str, ...]) -> float:
    """RULER's: the share of references that occur in the answer, whatever their case."""
    return sum(reference.lower() in answer.lower() for reference in references) / len(references)


def _any(answer: str, references: tuple[str, ...]) -> float:
    """RULER's for questions: whether some reference occurs in the answer, whatever its case."""
    return float(any(reference.lower() in answer.lower() for reference in references))


def _first_number(answer: str, references: tuple[str, ...]) -> float:
    """InfiniteBench's for passkeys and numbers: whether the answer's first number is the reference."""
    found = re.search(r"[0-9]+", answer)
    return float(found is not None and found[0] in references)


def _first_word(answer: str, references: tuple[str, ...]) -> float:
    """Whether the answer begins with a reference."""
    return float(answer.split()[:1] in [[reference] for reference in references])


METRICS: dict[str, Callable[[str, tuple[str, ...]], float]] = {
    "all": _all,
    "any": _any,
    "first_number": _first_number,
    "first_word": _first_word,
    "copied_records": forms.copied_records,
    "numbered_lines": forms.numbered_lines,
    "headings": forms.headings,
}
