"""Retrieval with a known answer at every length, in chunks: right and wrong where it must be."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.engine import engine_arguments, run
from benchmarks.gpu.report import Report
from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec
from vllm_trimix.demo.prompts import DemoPrompt, make_demo_prompt
from vllm_trimix.demo.vocabulary import build_tokenizer, vocabulary
from vllm_trimix.patterns.triangle import Triangle

_SPEC = CircuitSpec()
_ANSWER_TOKENS = 2
_PUBLISHED = {"n_init": Triangle.n_init, "n_local": Triangle.n_local, "last_n": Triangle.last_n}


def circuit(report: Report) -> None:
    """One and two hops, triangle and opted out, with the lookup layer dense or sparse, or one after the other."""
    model = report.folder / "model"
    make_demo_model(model, _SPEC)
    tokenizer = build_tokenizer(vocabulary())
    asked = [
        make_demo_prompt(tokens=length, hops=hops, seed=seed)
        for length in report.settings["lengths"]
        for hops in (1, 2)
        for seed in range(report.settings["seeds"])
    ]
    wave: list[dict[str, Any]] = []
    for prompt in asked:
        ids = tokenizer.encode(prompt.prompt).ids
        for args in (None, {"trimix": "off"}):
            wave.append({"prompt": ids, "max_tokens": _ANSWER_TOKENS, "extra_args": args})
    engine = {
        **engine_arguments(report, "bfloat16"),
        "max_model_len": max(report.settings["lengths"]) + _ANSWER_TOKENS,
        "max_num_batched_tokens": report.settings["chunk"],
        "max_num_seqs": 8,
        "enforce_eager": not report.settings["graphs"],
    }
    wrong: list[str] = []
    starts = {"dense": _SPEC.lookup_layer + 1, "sparse": _SPEC.lookup_layer}
    for starting_layer in (starts[lookup] for lookup in report.settings["lookups"]):
        trimix = {**_PUBLISHED, "starting_layer": starting_layer}
        result = run(report, f"from_layer_{starting_layer}", model, [wave], engine=engine, trimix=trimix)
        said = [tokenizer.decode(answer["tokens"]).split()[:1] for answer in result.waves[0]]
        lookup_is_sparse = starting_layer <= _SPEC.lookup_layer
        for kind, answers in (("triangle", said[::2]), ("opted out", said[1::2])):
            sparse = lookup_is_sparse and kind == "triangle"
            wrong += _check(report, f"from layer {starting_layer}, {kind}", asked, answers, lookup_is_sparse=sparse)
        rows, due = result.rows["triangle"], sum(prompt.tokens - Triangle.last_n for prompt in asked)
        report.check(f"from layer {starting_layer}, rows", rows == due, f"{rows} triangle rows, {due} due")
    longest = max(report.settings["lengths"])
    report.seen(
        wrong[0] if wrong else f"{len(asked)} questions about up to {longest} tokens: every answer as it must be"
    )


def _check(
    report: Report, name: str, asked: list[DemoPrompt], answers: list[list[str]], *, lookup_is_sparse: bool
) -> list[str]:
    """Every answer, by length and hops; a two-hop question whose lookup is sparse must name the alias's key."""
    unexpected = []
    for prompt, answer in zip(asked, answers, strict=True):
        expected = prompt.wrong_answer if lookup_is_sparse and prompt.hops == 2 else prompt.answer
        if answer != [expected]:
            unexpected.append(f"{name}: {prompt.hops}-hop, {prompt.tokens} tokens: {answer}, expected {expected}")
    report.check(name, not unexpected, "; ".join(unexpected[:3]) or f"{len(asked)} answers as expected")
    return unexpected
