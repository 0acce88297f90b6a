"""What an evaluation leaves beside its answers: ``result.json``, ``report.md`` and plots."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from vllm_trimix.evaluation import plots
from vllm_trimix.evaluation.markdown import interval, markdown, nats, nats_interval, points, warnings
from vllm_trimix.evaluation.outcome import Evaluation
from vllm_trimix.evaluation.sample import Measure


def write(folder: Path, evaluation: Evaluation) -> None:
    """Writes ``result.json``, ``report.md`` and the plots that fit the suite."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "result.json").write_text(json.dumps(as_json(evaluation), indent=1) + "\n")
    pictures = plots.draw(folder, evaluation.results, evaluation.configurations)
    (folder / "report.md").write_text(markdown(evaluation, pictures), encoding="utf-8")


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
