"""When an engine's answers are off: which requests, as if by which rule, and only in a batch or only under graphs."""

from __future__ import annotations

import math
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.report import Report
from tests.engine.ledger import Chunk
from tests.engine.models import NUM_LAYERS, true_logprobs
from tests.engine.run import LAYERS, PATTERN, Result
from vllm_trimix.patterns.triangle import Triangle

Request = dict[str, Any]
Rule = tuple[frozenset[int], Triangle]
Rerun = Callable[[list[Request], bool], Result]
"""Starts another engine, with CUDA graphs or without, on some of the wave's requests."""

_DENSE: Rule = (frozenset(), PATTERN)
_MASKED: Rule = (LAYERS, PATTERN)
# Mistakes that a wrong answer may be the right answer to.
_MISTAKES: dict[str, Rule] = {
    "all rows dense": _DENSE,
    "masked as if not opted out": _MASKED,
    "without sinks": (LAYERS, replace(PATTERN, n_init=0)),
    "without dense last rows": (LAYERS, replace(PATTERN, last_n=0)),
    "with a window one key short": (LAYERS, replace(PATTERN, n_local=PATTERN.n_local - 1)),
    "with a window one key long": (LAYERS, replace(PATTERN, n_local=PATTERN.n_local + 1)),
    "with one last row too few": (LAYERS, replace(PATTERN, last_n=PATTERN.last_n - 1)),
    "masked in all layers": (frozenset(range(NUM_LAYERS)), PATTERN),
    "masked one layer too early": (frozenset(layer - 1 for layer in LAYERS), PATTERN),
    "masked without the first triangle layer": (LAYERS - {min(LAYERS)}, PATTERN),
}
# Each costs as many passes of the reference as there are mistakes.
_MOST_FOLLOWED = 3
_MOST_STOCK_ERROR = 0.5


def triage_engine(
    report: Report,
    name: str,
    model: Path,
    wave: list[Request],
    result: Result,
    *,
    rerun: Rerun | None = None,
    budget: float | None = None,
) -> str:
    """Says what is wrong with a wave's answers, in the stage's result under ``triage_NAME`` and in a printed line.

    Args:
        report: The stage's; ``graphs`` and ``runner`` of its settings say how the answers were made, ``reruns`` how
            many engines may be started again (2).
        name: Of the scenario.
        model: The small model.
        wave: Requests, some of them opted out.
        result: What the engine gave; its first wave.
        rerun: Starts an engine for the smallest request that is wrong; None is not to.
        budget: Largest difference of a log-probability that is allowed; None takes it from the opted-out requests.

    Returns:
        The line.
    """
    answers = result.waves[0]
    off = [_differences(model, request, answer, _own(request)) for request, answer in zip(wave, answers, strict=True)]
    budget = _budget(wave, off) if budget is None else budget
    chunks = result.ledgers[0].chunks if result.ledgers else []
    found = [_request(index, wave, answers, off, budget, chunks) for index in range(len(wave))]
    wrong = [entry["request"] for entry in found if entry["first"] is not None]
    # The shortest first.
    for index in sorted(wrong, key=lambda index: len(wave[index]["prompt"]))[:_MOST_FOLLOWED]:
        found[index]["mistakes"] = {
            mistake: max(_differences(model, wave[index], answers[index], rule))
            for mistake, rule in _MISTAKES.items()
            if rule != _own(wave[index])
        }
    said = [_count(wave, wrong)]
    said += _shared(found)
    said += [_sentence(found[index], budget) for index in wrong if "mistakes" in found[index]]
    reruns: dict[str, Any] = {}
    if wrong and rerun is not None:
        smallest = min(wrong, key=lambda index: len(wave[index]["prompt"]))
        reruns = _rerun(report, model, wave[smallest], budget, rerun)
        said.append(_verdict(reruns, graphs=bool(report.settings.get("graphs"))))
    how = {"runner": report.settings.get("runner"), "graphs": report.settings.get("graphs")}
    line = f"{name}: " + "; ".join(said)
    report.figure(
        **{f"triage_{name}": {**how, "budget": budget, "requests": found, "reruns": reruns, "line": line}},
    )
    print(f"triage: {line}", flush=True)
    return line


def _own(request: Request) -> Rule:
    return _DENSE if (request.get("extra_args") or {}).get("trimix") == "off" else _MASKED


def _differences(model: Path, request: Request, answer: dict[str, Any], rule: Rule) -> list[float]:
    """Of each token's log-probability from its truth; infinite where it is no number."""
    layers, pattern = rule
    truth = true_logprobs(model, request["prompt"], answer["tokens"], layers=layers, pattern=pattern)
    pairs = zip(truth, answer["logprobs"], strict=True)
    return [abs(a - b) if math.isfinite(b) else math.inf for a, b in pairs]


def _budget(wave: list[Request], off: list[list[float]]) -> float:
    """As the stages have it: twice stock's own error, here without what is no rounding."""
    stock = [max(each) for request, each in zip(wave, off, strict=True) if _own(request) == _DENSE]
    return 2 * max((error for error in stock if error < _MOST_STOCK_ERROR), default=0.0) + 2e-5


def _request(
    index: int,
    wave: list[Request],
    answers: list[dict[str, Any]],
    off: list[list[float]],
    budget: float,
    chunks: list[Chunk],
) -> dict[str, Any]:
    prompt = len(wave[index]["prompt"])
    mine = [(chunk.first, chunk.rows) for chunk in chunks if chunk.request == index and chunk.first < prompt]
    edge = prompt - PATTERN.last_n
    return {
        "request": index,
        "prompt": prompt,
        "opted_out": _own(wave[index]) == _DENSE,
        "distance": max(off[index]),
        "first": next((token for token, error in enumerate(off[index]) if not error <= budget), None),
        "tokens": len(off[index]),
        "wrong_tokens": sum(not error <= budget for error in off[index]),
        "nan": sum(not math.isfinite(value) for value in answers[index]["logprobs"]),
        "chunks": mine,
        # Of a prompt of which the rule hides something.
        "straddles": prompt > PATTERN.dense_len and any(first < edge < first + rows for first, rows in mine),
    }


def _count(wave: list[Request], wrong: list[int]) -> str:
    out = sum(_own(wave[index]) == _DENSE for index in wrong)
    return f"{len(wrong)} of {len(wave)} requests are wrong, {out} of them opted out"


def _shared(found: list[dict[str, Any]]) -> list[str]:
    """What the wrong requests have in common and no right one has; else what is only among the wrong."""
    wrong = {entry["request"] for entry in found if entry["first"] is not None}
    if not wrong or len(wrong) == len(found):
        return []
    properties: dict[str, Callable[[dict[str, Any]], bool]] = {
        "opted out": lambda entry: entry["opted_out"],
        "are under the triangle": lambda entry: not entry["opted_out"],
        "are under the triangle and longer than it is dense": lambda entry: (
            not entry["opted_out"] and entry["prompt"] > PATTERN.dense_len
        ),
        "have prompts that were cut into chunks": lambda entry: len(entry["chunks"]) > 1,
        "are under the triangle and cut into chunks": lambda entry: not entry["opted_out"] and len(entry["chunks"]) > 1,
        "have a chunk that straddles the last rows": lambda entry: entry["straddles"],
        "are under the triangle with a chunk that straddles the last rows": lambda entry: (
            not entry["opted_out"] and entry["straddles"]
        ),
    }
    holders = {text: {entry["request"] for entry in found if has(entry)} for text, has in properties.items()}
    exact = [f"exactly those that {text}" for text, holder in holders.items() if holder == wrong]
    narrowest = min(
        ((len(holder), text) for text, holder in holders.items() if wrong < holder and len(holder) < len(found)),
        default=None,
    )
    said = exact[:1] or (
        [f"all of them {narrowest[1]}, as {narrowest[0] - len(wrong)} right ones"] if narrowest else []
    )
    if all(entry["first"] is None or entry["first"] > 0 for entry in found):
        said.append("first tokens are right: decode, not prefill")
    return said


def _sentence(entry: dict[str, Any], budget: float) -> str:
    kind = "opted out" if entry["opted_out"] else "triangle"
    if entry["nan"]:
        off = f"{entry['nan']} of {entry['tokens']} are no numbers"
    else:
        off = f"{entry['distance']:.3g} off where {budget:.3g} is allowed"
    text = (
        f"request {entry['request']} ({entry['prompt']} tokens, {kind}): token {entry['first']} is the first of "
        f"{entry['wrong_tokens']} wrong ones, {off}"
    )
    nearest = min(entry["mistakes"], key=lambda mistake: entry["mistakes"][mistake])
    if entry["mistakes"][nearest] <= budget:
        return f"{text}, right if computed {nearest}"
    return f"{text}, nearest to one computed {nearest} ({entry['mistakes'][nearest]:.3g} off)"


def _rerun(report: Report, model: Path, request: Request, budget: float, rerun: Rerun) -> dict[str, Any]:
    """The request alone: eagerly, and with graphs if the wave had them. True is right."""
    ways = [("eager", False), *([("graphs", True)] if report.settings.get("graphs") else [])]
    found: dict[str, Any] = {}
    for way, graphs in ways[: report.settings.get("reruns", 2)]:
        try:
            answer = rerun([request], graphs).waves[0][0]
            distance = max(_differences(model, request, answer, _own(request)))
            found[way] = {"right": distance <= budget, "distance": distance}
        except Exception as error:
            traceback.print_exc()
            found[way] = {"failed": f"{type(error).__name__}: {error}"[-500:]}
    return found


def _verdict(reruns: dict[str, Any], *, graphs: bool) -> str:
    if not reruns:
        return "no engine was started again"
    failed = [f"{way}: {found['failed']}" for way, found in reruns.items() if "failed" in found]
    if failed:
        return f"started again, alone, an engine failed: {'; '.join(failed)}"
    if not reruns["eager"]["right"]:
        return f"alone and eager it is wrong as well ({reruns['eager']['distance']:.3g} off): always"
    if "graphs" not in reruns:
        return f"alone and eager it is right: only in a batch{', or only under graphs' if graphs else ''}"
    if not reruns["graphs"]["right"]:
        distance = reruns["graphs"]["distance"]
        return f"alone it is right eagerly and wrong with graphs ({distance:.3g} off): only under graphs"
    return "alone it is right, eagerly and with graphs: only in a batch"
