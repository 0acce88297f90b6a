"""Runs engine jobs in child processes and compares what they say with the truth."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.engine.models import true_logprobs
from vllm_trimix.patterns.triangle import Triangle

ROOT = Path(__file__).parents[2]
PATTERN = Triangle(n_init=4, n_local=16, last_n=8)
LAYERS = frozenset({1, 2, 3})
CONFIG = {
    "starting_layer": 1,
    "n_init": PATTERN.n_init,
    "n_local": PATTERN.n_local,
    "last_n": PATTERN.last_n,
    "min_prompt_len": 0,
    "stats_log_interval": 0.2,
}


@dataclass
class Result:
    """One job's answers and counters.

    Attributes:
        waves: Per wave and request: ``tokens``, ``logprobs``, ``cached_tokens``.
        rows: Query rows by class, over the whole run.
        metrics: vLLM's own counters.
        log: Everything the engine printed.
        refusals: What the engine said to each of the ``bad_extra_args``.
        spans: Chunks of dynamic patterns, in order, by prompt length: position, sparse rows, keys.
    """

    waves: list[list[dict[str, Any]]]
    rows: Counter[str]
    metrics: dict[str, float]
    log: str
    refusals: list[str]
    spans: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)


def run_job(
    tmp_path: Path,
    model: Path,
    waves: list[list[dict[str, Any]]],
    *,
    engine: dict[str, Any] | None = None,
    trimix: dict[str, Any] | None = None,
    env: dict[str, str] | None = None,
    stdout_rows: bool = False,
    bad_extra_args: list[dict[str, Any]] | None = None,
) -> Result:
    """Runs one engine over the waves.

    Args:
        tmp_path: Where the result file goes.
        model: HF checkpoint.
        waves: Lists of requests; each list is one ``LLM.generate`` call.
        engine: LLM arguments on top of the child's own.
        trimix: ``trimix`` keys on top of ``CONFIG``.
        env: Environment of the engine.
        stdout_rows: Read the counters from the log lines: workers are other processes.
        bad_extra_args: Arguments to try after the waves, expecting a refusal.
    """
    engine = {"additional_config": {"trimix": {**CONFIG, **(trimix or {})}}, **(engine or {}), "model": str(model)}
    job = {"engine": engine, "waves": waves, "env": env or {}, "bad_extra_args": bad_extra_args or []}
    out = tmp_path / "result.json"
    process = subprocess.run(
        [sys.executable, "-m", "tests.engine.child", str(out)],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
        timeout=300,
        check=False,
    )
    log = process.stdout + process.stderr
    assert process.returncode == 0, log[-6000:]
    result = json.loads(out.read_text())
    rows: Counter[str] = Counter()
    for totals in logged_rows(log) if stdout_rows else result["stats"]:
        rows.update(totals)
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for prompt_len, *span in result["spans"]:
        chunks = spans.setdefault(prompt_len, [])
        # A resumed request starts again: what it computes last stays in the cache.
        chunks[:] = [*(chunk for chunk in chunks if chunk[0] < span[0]), tuple(span)]
    return Result(result["waves"], rows, result["metrics"], log, result["refusals"], spans)


def logged_rows(log: str) -> list[dict[str, int]]:
    """The counters of every ``TRIMIX rows:`` line."""
    found = []
    for line in re.findall(r"TRIMIX rows: (.*)", log):
        pairs = dict(item.split("=", 1) for item in line.split())
        reasons = pairs.pop("reasons")
        rows = {key: int(value) for key, value in pairs.items()}
        if reasons != "none":
            rows.update({key: int(value) for key, value in (item.split(":") for item in reasons.split(","))})
        found.append(rows)
    return found


def both_ways(prompts: list[list[int]], max_tokens: int = 6) -> list[dict[str, Any]]:
    """Each prompt once under the triangle and once opted out, sharing the batch."""
    return [
        {"prompt": prompt, "max_tokens": max_tokens, "extra_args": args}
        for prompt in prompts
        for args in (None, {"trimix": "off"})
    ]


def assert_matches_truth(model: Path, wave: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    """Triangle answers must be as close to the masked truth as stock's are to the dense truth.

    The budget is the error of this very engine on the opted-out requests, which run vLLM's own kernel: twice its
    largest error, plus fp32 rounding of a log-softmax. The dense truth must miss that budget by far on long prompts.
    """
    errors: dict[bool, float] = {True: 0.0, False: 0.0}
    gap = 0.0
    for request, answer in zip(wave, answers, strict=True):
        dense = (request.get("extra_args") or {}).get("trimix") == "off"
        layers = frozenset() if dense else LAYERS
        truth = true_logprobs(model, request["prompt"], answer["tokens"], layers=layers, pattern=PATTERN)
        error = max(abs(a - b) for a, b in zip(truth, answer["logprobs"], strict=True))
        errors[dense] = max(errors[dense], error)
        if not dense and len(request["prompt"]) > 4 * PATTERN.dense_len:
            other = true_logprobs(model, request["prompt"], answer["tokens"], layers=frozenset(), pattern=PATTERN)
            gap = max(gap, *(abs(a - b) for a, b in zip(other, answer["logprobs"], strict=True)))
    budget = 2 * errors[True] + 2e-5
    assert errors[True] < 1e-2, f"stock itself is {errors[True]} off: the truth is not comparable"
    assert errors[False] <= budget, f"triangle is {errors[False]} off its truth; stock is {errors[True]} off"
    assert gap > 20 * budget, f"the dense truth is only {gap} away: this run proves nothing"
