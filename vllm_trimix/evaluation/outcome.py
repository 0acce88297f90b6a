"""All of an evaluation, as its reports show it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm_trimix.evaluation.answers import Answer
from vllm_trimix.evaluation.cells import Result
from vllm_trimix.evaluation.configurations import Configuration


@dataclass(frozen=True)
class Evaluation:
    """All of an evaluation.

    Attributes:
        suite, model: What was evaluated.
        settings: Of the run, plain JSON.
        environment: Hardware and versions.
        configurations: Stock first.
        facts: What each ran, where known.
        results: By task, length and configuration.
        answers: Of this evaluation alone.
        samples: Names of the samples and their digests.
        unavailable: Why a task has no samples, by task.
        notes: What the suite has to say of its prompts.
        failures: Why a configuration was given up.
        command: How to repeat it.
    """

    suite: str
    model: str
    settings: dict[str, Any]
    environment: dict[str, Any]
    configurations: Sequence[Configuration]
    facts: dict[str, dict[str, Any]]
    results: Sequence[Result]
    answers: Sequence[Answer]
    samples: dict[str, str]
    unavailable: dict[str, str]
    notes: Sequence[str]
    failures: dict[str, str]
    command: str

    @property
    def prompts(self) -> str:
        """A hash of all prompts and how they are scored."""
        return hashlib.sha256(json.dumps(sorted(self.samples.items())).encode()).hexdigest()[:16]

    @property
    def failed(self) -> list[Answer]:
        """Prompts without an answer."""
        return [answer for answer in self.answers if answer.error is not None]

    def of(self, configuration: str) -> list[Result]:
        """One configuration's results."""
        return [result for result in self.results if result.configuration == configuration]
