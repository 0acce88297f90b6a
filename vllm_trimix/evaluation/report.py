"""What an evaluation leaves beside its answers: ``result.json``, ``report.md`` and plots."""

from __future__ import annotations

import datetime
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_trimix.evaluation import plots
from vllm_trimix.evaluation.answers import Answer
from vllm_trimix.evaluation.cells import Result
from vllm_trimix.evaluation.configurations import Configuration
from vllm_trimix.evaluation.markdown import interval, markdown, nats, nats_interval, points, warnings
from vllm_trimix.evaluation.sample import Measure


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


def write(folder: Path, evaluation: Evaluation) -> None:
    """Writes ``result.json``, ``report.md`` and the plots that fit the suite."""
    (folder / "result.json").write_text(json.dumps(as_json(evaluation), indent=1) + "\n")
    pictures = plots.draw(folder, evaluation.results, evaluation.configurations)
    (folder / "report.md").write_text(markdown(evaluation, pictures))


def console(evaluation: Evaluation) -> list[str]:
    """The tables for a terminal, without pictures and times."""
    lines = warnings(evaluation)
    for result in evaluation.results:
        if result.difference is not None and result.score is not None:
            is_nats = result.measure == Measure.PERPLEXITY
            score, by = (nats, nats_interval) if is_nats else (points, interval)
            lines.append(
                f"{result.configuration:<16} {result.task:<16} {result.length:>7}  {score(result.score):>7}  "
                f"{by(result.difference):<26} {result.difference.verdict:<10} n={result.n}"
            )
    return lines


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The result as data."""
    return {
        "kind": "evaluation",
        "suite": evaluation.suite,
        "model": evaluation.model,
        "date": datetime.date.today().isoformat(),
        "settings": evaluation.settings,
        "prompts": evaluation.prompts,
        "environment": evaluation.environment,
        "configurations": {
            configuration.name: {
                "entry": configuration.entry,
                **({"ablation": configuration.ablation} if configuration.ablation else {}),
                "facts": evaluation.facts.get(configuration.name),
            }
            for configuration in evaluation.configurations
        },
        "cells": [result.as_json() for result in evaluation.results],
        "unavailable": evaluation.unavailable,
        "notes": list(evaluation.notes),
        "failures": evaluation.failures,
        "failed": [
            {"configuration": answer.configuration, "sample": answer.sample, "error": answer.error}
            for answer in evaluation.failed
        ],
        "command": evaluation.command,
    }
