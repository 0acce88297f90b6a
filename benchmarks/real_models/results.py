"""Answers as data that is kept: ``python -m benchmarks.real_models.results build/real-eval benchmarks/results/NAME``.

The folders of an evaluation hold all that was said, the likeliest tokens at each place among it, some megabytes a
folder. What is kept of them is ``result.json`` and ``answers.jsonl.gz``: each answer with its score, its tokens where
they are compared, and in place of the likeliest tokens their divergence from stock's, token by token.
"""

from __future__ import annotations

import argparse
import datetime
import gzip
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_models import pattern_results
from vllm_trimix.config.entry import Resolved
from vllm_trimix.evaluation import cells
from vllm_trimix.evaluation.answers import Answer, parse
from vllm_trimix.evaluation.configurations import STOCK
from vllm_trimix.evaluation.sample import Measure

MAX_BYTES = 1_000_000
"""Of a file that is kept."""
_ANSWERS = "answers.jsonl.gz"
_KEPT = ("configuration", "sample", "task", "length", "index", "depth", "score", "seconds", "prompt_tokens", "text")
_FIGURES = 3


@dataclass(frozen=True)
class Kept:
    """What is kept of a folder.

    Attributes:
        name: Of the folder, e.g. ``smollm2-ruler``.
        result: ``result.json``.
        answers: Lines of the answers.
    """

    name: str
    result: dict[str, Any]
    answers: list[dict[str, Any]]

    def cell(self, task: str, length: int, configuration: str) -> dict[str, Any] | None:
        """The result of a configuration at a task and length; None where it wasn't asked."""
        keys = {"task": task, "length": length, "configuration": configuration}
        found = (cell for cell in self.result["cells"] if all(cell[key] == value for key, value in keys.items()))
        return next(found, None)

    def of(self, configuration: str) -> list[dict[str, Any]]:
        """The results of a configuration, short prompts first."""
        return [cell for cell in self.result["cells"] if cell["configuration"] == configuration]


def read(folder: Path) -> dict[str, Kept]:
    """What is kept in a folder of folders, by name; empty where there is none.

    Raises:
        ValueError: A file is no such result.
    """
    found = {}
    for path in sorted(folder.glob("*/result.json")):
        try:
            lines = gzip.decompress((path.parent / _ANSWERS).read_bytes()).decode().splitlines()
            found[path.parent.name] = Kept(path.parent.name, json.loads(path.read_text()), [*map(json.loads, lines)])
        except (ValueError, OSError) as error:
            raise ValueError(f"{path.parent}: no results that were kept: {error}; write them anew") from None
    return found


def write(source: Path, target: Path) -> list[str]:
    """Keeps every folder of an evaluation; returns their names.

    Args:
        source: The output of ``benchmarks.real_models.evaluate``, which may still be running.
        target: The folder for what is kept.

    Raises:
        ValueError: A file holds no answers, or would be too large.
        OSError: What can't be read or written.
    """
    names = []
    for path in sorted(source.glob("*/answers.jsonl")):
        about, answers, facts = _read(path)
        if not answers or not facts:
            continue
        folder = target / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        date = datetime.datetime.fromtimestamp(path.stat().st_mtime).date().isoformat()
        result = _result(about, answers, facts, date)
        lines = "".join(f"{json.dumps(line)}\n" for line in _lines(answers))
        packed = gzip.compress(lines.encode(), mtime=0)
        if len(packed) > MAX_BYTES:
            raise ValueError(f"{folder / _ANSWERS}: {len(packed)} bytes are more than {MAX_BYTES}: ask fewer prompts")
        (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
        (folder / _ANSWERS).write_bytes(packed)
        names.append(folder.name)
    return names + pattern_results.keep(source, target, _ANSWERS)


def _read(path: Path) -> tuple[dict[str, Any], list[Answer], dict[str, dict[str, Any]]]:
    """What the answers are of, the good ones, and what each configuration ran; a line being written is left out."""
    try:
        about, *entries = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
        answers = [parse(entry) for entry in entries if "facts" not in entry]
        facts = {entry["configuration"]: entry["facts"] for entry in entries if "facts" in entry}
    except (ValueError, TypeError, KeyError):
        raise ValueError(f"{path} holds no answers of an evaluation") from None
    latest = {(answer.configuration, answer.sample): answer for answer in answers if answer.error is None}
    return about, list(latest.values()), facts


def _result(
    about: dict[str, Any], answers: Sequence[Answer], facts: dict[str, dict[str, Any]], date: str
) -> dict[str, Any]:
    names = dict.fromkeys([STOCK, *(answer.configuration for answer in answers)])
    ran = {name: (facts.get(name) or {}).get("resolved") for name in names}
    resolved = {name: Resolved.model_validate(found) if found else None for name, found in ran.items()}
    known = facts.get(STOCK) or next(iter(facts.values()))
    return {
        "kind": "evaluation",
        **{key: about[key] for key in ("suite", "model", "engine flags", "seed", "chat")},
        "date": date,
        "environment": {key: known[key] for key in ("hardware", "versions", "engine")},
        "configurations": {
            name: {key: (facts.get(name) or {}).get(key) for key in ("resolved", "start_line", "rows")}
            for name in names
        },
        "cells": [result.as_json() for result in cells.results(answers, resolved)],
    }


def _lines(answers: Iterable[Answer]) -> list[dict[str, Any]]:
    answers = list(answers)
    dense = {answer.sample: answer for answer in answers if answer.configuration == STOCK}
    lines = []
    for answer in answers:
        line = {key: getattr(answer, key) for key in _KEPT}
        if answer.tokens:
            line["tokens"] = answer.tokens
        if answer.measure == Measure.AGREEMENT and answer.sample in dense:
            line["kl"] = [float(f"{value:.{_FIGURES}g}") for value in cells.divergences(answer, dense[answer.sample])]
        lines.append({key: value for key, value in line.items() if value not in (None, "")})
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models.results", description=__doc__)
    parser.add_argument("source", type=Path, metavar="DIR", help="output of benchmarks.real_models.evaluate")
    parser.add_argument("target", type=Path, metavar="KEPT", help="a folder of benchmarks/results")
    args = parser.parse_args(argv)
    try:
        names = write(args.source, args.target)
    except (OSError, ValueError) as error:
        print(f"real-models: error: {error}", file=sys.stderr)
        return 1
    print(f"real-models: kept {', '.join(names) or 'nothing: there are no answers'} in {args.target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
