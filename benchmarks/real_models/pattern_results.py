"""What is kept of measured patterns besides answers: the keys that they read, and their times to the first token."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from benchmarks.real_models.density import RESULT
from benchmarks.real_models.patterns import DENSITY, TTFT
from vllm_trimix.evaluation.passages import ANSWER_TOKENS

NAME = "patterns"
"""Of the folder."""
_ROW = ("config", "ratio_to_stock", "ratio_ci95", "confidence", "repeats", "ttft_median_s", "density")


def keep(source: Path, target: Path, answers: str) -> list[str]:
    """Keeps the means of an evaluation's measurements; returns the folder's name, or nothing where there are none.

    Args:
        source: The output of ``benchmarks.real_models.patterns``.
        target: The folder for what is kept.
        answers: Name of the file of answers that every kept folder has; here it is empty.

    Raises:
        ValueError: A file is no such result.
        OSError: What can't be read or written.
    """
    densities = [_density(path) for path in sorted(source.glob(f"*-{NAME}-{DENSITY}-*/{RESULT}"))]
    times = [_times(path) for path in sorted(source.glob(f"*-{NAME}-{TTFT}-*/result.json"))]
    if not densities and not times:
        return []
    folder = target / NAME
    folder.mkdir(parents=True, exist_ok=True)
    # What a reader of any result looks for; each part has its own as well.
    environment = [*densities, *times][-1]["environment"]
    result = {
        "kind": NAME,
        "environment": environment,
        "configurations": {},
        "cells": [],
        DENSITY: densities,
        TTFT: times,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / answers).write_bytes(gzip.compress(b"", mtime=0))
    return [NAME]


def _density(path: Path) -> dict[str, Any]:
    found = _read(path)
    if not {"model", "length", "environment", "layers"} <= found.keys():
        raise ValueError(f"{path} holds no shares of benchmarks.real_models.density; remove its folder")
    return found


def _times(path: Path) -> dict[str, Any]:
    found = _read(path)
    try:
        rows = found["rows"]
        return {
            "model": Path(found["settings"]["model"]).name,
            # Prompts are as long as those of the answers that are compared.
            "length": rows[0]["length"] + ANSWER_TOKENS,
            "environment": found["environment"],
            "rows": [{key: row[key] for key in _ROW} for row in rows],
        }
    except (KeyError, IndexError, TypeError):
        raise ValueError(f"{path} holds no times of benchmarks.benchmark_ttft; remove its folder") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}; remove its folder and measure again") from None
    return found
