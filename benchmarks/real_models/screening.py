"""Which tasks a stage asks: those that stock was seen to solve."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from benchmarks.real_models.plan import SCREENED, SOLVED, Rule, Stage
from vllm_trimix.evaluation.suites.registry import SUITES

Scores = Mapping[tuple[str, int], float]
"""Mean score of stock on the screening's prompts, by task and length."""


def all_tasks(suite: str) -> tuple[str, ...]:
    """A suite's tasks in English."""
    return tuple(SUITES[suite].tasks["english"])


def scores(folder: Path) -> dict[tuple[str, int], float]:
    """What stock scored in a folder of answers, on the first prompts of each task and length, where all were asked.

    Raises:
        ValueError: The file is none of answers.
    """
    path = folder / "answers.jsonl"
    found: dict[tuple[str, int], dict[int, float]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[1:-1] if path.exists() else ()):
        try:
            entry = json.loads(line)
            if "facts" not in entry and entry["configuration"] == "stock" and entry["index"] < SCREENED:
                found.setdefault((entry["task"], entry["length"]), {})[entry["index"]] = entry.get("score", 0.0)
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path}: line {number + 2} is no answer; remove the folder, or take another") from None
    return {cell: fmean(values.values()) for cell, values in found.items() if len(values) == SCREENED}


def tasks(stage: Stage, found: Scores) -> list[str]:
    """The tasks that a stage asks.

    A task that stock rarely solves at a length isn't asked at longer ones, screened there or not.

    Args:
        stage: The stage.
        found: ``scores`` of the folder in which its tasks were screened.
    """
    if stage.rule == Rule.NAMED:
        # A stage that asks no tasks names what else it does.
        return list(stage.tasks or all_tasks(stage.suite))
    there = all_tasks(stage.suite)
    failed = {task for (task, length), score in found.items() if score < SOLVED and length < stage.length}
    if stage.rule == Rule.SCREEN:
        return _first([task for task in there if task not in failed], stage.tasks, stage.most)
    solved = [task for task in there if task not in failed and found.get((task, stage.length), 0.0) >= SOLVED]
    return _first(solved, stage.tasks, stage.most)


def _first(names: Sequence[str], preferred: Sequence[str], most: int | None) -> list[str]:
    if most is None:
        return list(names)
    ranked = [name for name in preferred if name in names] + [name for name in names if name not in preferred]
    return ranked[:most]
