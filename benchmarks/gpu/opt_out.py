"""Requests that opt out get stock's answers, bit for bit: the same prompts in a TRIMIX engine and in stock's."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from benchmarks.gpu.engine import engine_arguments, run, runner_env
from benchmarks.gpu.report import Report
from benchmarks.gpu.small_model import prompts, save_small_model

_LENGTHS = [1, 20, 131, 300, 500, 777]
_TOKENS = 8
Answers = list[dict[str, Any]]


def opt_out(report: Report) -> None:
    """Two engines with the same flags, each asked twice: what stock doesn't repeat itself can't be asked of TRIMIX."""
    model = save_small_model(report.folder / "model")
    asked = [{"prompt": prompt, "max_tokens": _TOKENS} for prompt in prompts(_LENGTHS, seed=2)]
    opted_out = [{**request, "extra_args": {"trimix": "off"}} for request in asked]
    engine = {**engine_arguments(report, "bfloat16"), "enforce_eager": not report.settings["graphs"]}
    env = runner_env(report)
    with ThreadPoolExecutor() as pool:
        stock_run = pool.submit(run, report, "stock", model, [asked, asked], engine=engine, stock=True, env=env)
        mine = run(report, "trimix", model, [opted_out, opted_out, asked], engine=engine, env=env)
        stock = stock_run.result()
    report.check("stock is stock", "TRIMIX" not in stock.log, "its log names no TRIMIX")
    own, place = difference(stock.waves[0], stock.waves[1])
    report.figure(stock_differs_from_itself=own)
    for number, answers in enumerate(mine.waves[:2], start=1):
        found, place = difference(stock.waves[0], answers)
        # Equal bits where stock repeats its own.
        report.check(f"wave {number}: stock's answers", found <= 2 * own, place or f"{len(asked)} answers, bit for bit")
    bites, place = difference(stock.waves[0], mine.waves[2])
    report.check("the mask bites", bites > 2 * own, place or "not opted out the answers are stock's too")
    due = 2 * sum(_LENGTHS)
    report.check("rows", mine.rows["opt_out"] == due, f"{mine.rows['opt_out']} opted-out rows, {due} due")
    how = f"as near to stock's as stock's own repetition, which is {own:.2g} off" if own else "stock's, bit for bit"
    report.seen(f"{len(asked)} opted-out answers of {_TOKENS} tokens: {how}")


def difference(expected: Answers, found: Answers) -> tuple[float, str]:
    """How far two waves' log-probabilities are apart, and where first.

    Returns:
        Nats, up to each answer's first other token; 0 only if all bits are equal, infinity where tokens differ
        though their log-probabilities don't. And the place, "" if there is none.
    """
    largest, place = 0.0, ""
    for length, one, other in zip(_LENGTHS, expected, found, strict=True):
        for position in range(_TOKENS):
            same = one["tokens"][position] == other["tokens"][position]
            apart = abs(one["logprobs"][position] - other["logprobs"][position])
            apart = apart if same or apart > 0 else math.inf
            if not apart <= 0 and not place:
                place = f"the prompt of {length} tokens, answer token {position}: {apart:.2g} apart"
            largest = apart if math.isnan(apart) else max(largest, apart)
            if not same or math.isnan(apart):
                break
    return largest, place
