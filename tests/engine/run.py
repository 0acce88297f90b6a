"""Runs engine jobs in child processes and compares what they say with the truth."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.engine.ledger import Chunk, Ledger
from tests.engine.models import VOCAB_SIZE, true_logprobs
from tests.tiers import Tier
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.stats import TOTALS

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
# Every boundary of the rule.
BOUNDARIES = [
    1,
    PATTERN.n_init,
    PATTERN.n_local,
    PATTERN.dense_len - 1,
    PATTERN.dense_len,
    PATTERN.dense_len + 1,
]


def prompts(lengths: list[int], seed: int = 0) -> list[list[int]]:
    """Random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB_SIZE, (length,), generator=generator).tolist() for length in lengths]


@dataclass
class Result:
    """One job's answers and counters.

    Attributes:
        waves: Per wave and request: ``tokens``, ``logprobs``, ``cached_tokens``.
        rows: Query rows by class, over the whole run.
        metrics: vLLM's own counters.
        ledgers: What each wave cost.
        generate_seconds: In ``LLM.generate``, all waves together.
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
    ledgers: list[Ledger] = field(default_factory=list)
    generate_seconds: float = 0.0


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
    timeout: int = 600,
) -> Result:
    """Runs one engine over the waves.

    Args:
        tmp_path: Where the result file goes.
        model: HF checkpoint.
        waves: Lists of requests; each list is one ``LLM.generate`` call.
        engine: LLM arguments on top of the child's own.
        trimix: ``trimix`` keys on top of ``CONFIG``.
        env: Environment of the engine.
        stdout_rows: Read the counters from the log lines: the engine core is another process.
        bad_extra_args: Arguments to try after the waves, expecting a refusal.
        timeout: Seconds; ample, for machines that do something else as well.
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
        timeout=timeout,
        check=False,
    )
    log = process.stdout + process.stderr
    assert process.returncode == 0, log[-6000:]
    result = json.loads(out.read_text())
    spans: dict[int, list[tuple[int, int, int]]] = {}
    for prompt_len, *span in result["spans"]:
        chunks = spans.setdefault(prompt_len, [])
        # A resumed request starts again: what it computes last stays in the cache.
        chunks[:] = [*(chunk for chunk in chunks if chunk[0] < span[0]), tuple(span)]
    ledgers = _ledgers(result["ledgers"])
    rows: Counter[str] = Counter()
    metrics: dict[str, float] = {}
    for ledger in ledgers:
        rows.update(ledger.rows)
        for name, value in ledger.metrics.items():
            metrics[name] = metrics.get(name, 0) + value
    if stdout_rows:
        for line in logged_rows(log):
            rows.update(line)
    seconds = result["generate_seconds"]
    return Result(result["waves"], rows, metrics, log, result["refusals"], spans, ledgers, seconds)


def _ledgers(found: list[dict[str, Any]]) -> list[Ledger]:
    """What each wave added to the totals; the rows are those of the first worker, and every other one's."""
    ledgers: list[Ledger] = []
    rows_before: dict[str, int] = {}
    metrics_before: dict[str, float] = {}
    for wave in found:
        totals = [_total(worker) for worker in wave["workers"]]
        classes = [{key: value for key, value in each.items() if key not in TOTALS} for each in totals]
        assert all(each == classes[0] for each in classes), f"workers count differently: {totals}"
        rows: dict[str, int] = totals[0] if totals else {}
        metrics: dict[str, float] = wave["metrics"]
        new_rows = Counter({key: number - rows_before.get(key, 0) for key, number in rows.items()})
        new_metrics = {key: value - metrics_before.get(key, 0) for key, value in metrics.items()}
        ledgers.append(Ledger(new_rows, new_metrics, [Chunk(*chunk) for chunk in wave["chunks"]]))
        rows_before, metrics_before = rows, metrics
    return ledgers


def _total(counters: list[dict[str, int]]) -> dict[str, int]:
    """Of a worker's runners."""
    return dict(sum(map(Counter, counters), Counter[str]()))


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


def count(tier: Tier, *key: object, waves: list[list[dict[str, Any]]], result: Result, engine: dict[str, Any]) -> None:
    """Reports an engine's run to its tier as one case; facts that its arguments rule out are left out."""
    found = [ledger.facts(wave, PATTERN) for wave, ledger in zip(waves, result.ledgers, strict=True)]
    facts = {name: any(each[name] for each in found) for name in found[0]}
    longest = max(len(request["prompt"]) for wave in waves for request in wave)
    if engine.get("max_num_batched_tokens", longest) >= longest:
        del facts["straddling"]
    if not engine.get("enable_prefix_caching"):
        del facts["cached"]
    if "num_gpu_blocks_override" not in engine:
        del facts["resumed"]
    tier.case(*key, **facts)


def both_ways(prompts: list[list[int]], max_tokens: int = 6) -> list[dict[str, Any]]:
    """Each prompt once under the triangle and once opted out, sharing the batch."""
    return [
        {"prompt": prompt, "max_tokens": max_tokens, "extra_args": args}
        for prompt in prompts
        for args in (None, {"trimix": "off"})
    ]


@dataclass
class Errors:
    """How far answers are from their truths, in nats of a token's log-probability.

    Attributes:
        stock: Largest of the requests that opted out, which run vLLM's own kernel, from the dense truth.
        triangle: Largest of the others, from the masked truth.
        gap: Of the first long prompt among the latter, from the dense truth.
    """

    stock: float = 0.0
    triangle: float = 0.0
    gap: float = 0.0

    def assert_within(self, stock: float) -> None:
        """Triangle answers must be as close to the masked truth as stock's are to the dense truth.

        The budget is the error of this very engine on opted-out requests: twice its largest error, plus fp32 rounding
        of a log-softmax. The dense truth must miss that budget by far on a long prompt.
        """
        budget = 2 * stock + 2e-5
        assert stock < 1e-2, f"stock itself is {stock} off: the truth is not comparable"
        assert self.triangle <= budget, f"triangle is {self.triangle} off its truth; stock is {stock} off"
        assert self.gap > 20 * budget, f"the dense truth is only {self.gap} away: this run proves nothing"


def _error(model: Path, prompt: list[int], answer: dict[str, Any], **rule: Any) -> float:
    truth = true_logprobs(model, prompt, answer["tokens"], pattern=PATTERN, **rule)
    return max(abs(a - b) for a, b in zip(truth, answer["logprobs"], strict=True))


def errors(model: Path, wave: list[dict[str, Any]], answers: list[dict[str, Any]]) -> Errors:
    """Compares a wave with the truth; a request's ``earlier`` is the prompt length of the one that it hits."""
    found = Errors()
    for request, answer in zip(wave, answers, strict=True):
        error = functools.partial(_error, model, request["prompt"], answer)
        if (request.get("extra_args") or {}).get("trimix") == "off":
            found.stock = max(found.stock, error(layers=frozenset()))
            continue
        earlier = (answer["cached_tokens"], request["earlier"]) if "earlier" in request else (0, 0)
        found.triangle = max(found.triangle, error(layers=LAYERS, earlier=earlier))
        if not found.gap and len(request["prompt"]) > 4 * PATTERN.dense_len:
            found.gap = error(layers=frozenset())
    return found


def assert_matches_truth(model: Path, wave: list[dict[str, Any]], answers: list[dict[str, Any]]) -> None:
    """Asserts it of a wave that has requests of both kinds."""
    found = errors(model, wave, answers)
    assert found.stock > 0, "no request opted out: there is no budget"
    found.assert_within(found.stock)
