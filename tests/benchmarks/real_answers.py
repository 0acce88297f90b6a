"""A made-up evaluation of the pretrained models, as ``vllm-trimix eval`` leaves it."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vllm_trimix.config.resolve import resolve
from vllm_trimix.evaluation.answers import Answers, answer_of
from vllm_trimix.evaluation.sample import Measure, Sample

RESOLVED = resolve({"layers": "20-29", "min_prompt_len": 0}, model="m", num_layers=30).model_dump(mode="json")
FACTS: dict[str, Any] = {
    "resolved": None,
    "hardware": "a machine",
    "versions": {"vllm": "0"},
    "engine": {"dtype": "float32"},
}


def put(folder: Path, suite: str, said: Iterable[tuple[str, Sample, dict[str, Any]]]) -> None:
    """Answers of a folder, and what their configurations ran."""
    about = {"kind": "evaluation", "suite": suite, "model": "m", "engine flags": [], "asked": "engine", "seed": 1}
    answers = Answers(folder, {**about, "chat": False})
    names: dict[str, None] = {}
    for name, sample, answer in said:
        answers.put([answer_of(name, "s", sample, answer)])
        names[name] = None
    for name in names:
        stock = name in ("stock", "noise-floor")
        more = {} if stock else {"resolved": RESOLVED, "start_line": "layers=20-29 of=30 pattern=triangle"}
        answers.put_facts(name, {**FACTS, **more})


def scored(task: str, length: int, right: dict[str, str], depth: float | None = None) -> list[Any]:
    """Answers to as many samples as each configuration's letters: r is right, w wrong."""
    return [
        (
            name,
            Sample(task, length, index, (1, 2, 3), ("7",), depth=depth),
            {"text": "7" if letter == "r" else "8", "seconds": 1.0},
        )
        for name, letters in right.items()
        for index, letter in enumerate(letters)
    ]


def compared(length: int, leans: dict[str, float], *, count: int = 2, tokens: int = 64) -> list[Any]:
    """Continuations whose likeliest token loses so much probability, from 0.9; they part at token 20 if it is much."""
    said = []
    for name, lean in leans.items():
        rows = [[[5, math.log(0.9 - lean)], [6, math.log(0.1 + lean)]]] * tokens
        answer = [5] * tokens if lean < 0.2 else [*[5] * 19, 6, *[5] * (tokens - 20)]
        for index in range(count):
            sample = Sample("prompts", length, index, (1, 2), max_tokens=tokens, measure=Measure.AGREEMENT)
            said.append((name, sample, {"text": "", "tokens": answer, "likeliest": rows, "seconds": 1.0}))
    return said


def long(length: int, parts_at: dict[str, int | None], *, tokens: int = 512) -> list[Any]:
    """Long answers that part from stock's at a token; None never."""
    said = []
    for name, place in parts_at.items():
        answer = list(range(tokens))
        if place is not None:
            answer[place:] = [0] * (tokens - place)
        sample = Sample(
            "list", length, 0, (1, 2), ("1",), metric="numbered_lines", max_tokens=tokens, keeps_tokens=True
        )
        said.append((name, sample, {"text": "1. A", "tokens": answer, "seconds": 1.0}))
    return said


def likelihood(length: int, nll: dict[str, float], *, count: int = 3) -> list[Any]:
    """Perplexity of a few texts."""
    return [
        (name, Sample("documents", length, i, (1, 2), measure=Measure.PERPLEXITY), {"nll": value + i, "seconds": 1.0})
        for name, value in nll.items()
        for i in range(count)
    ]


def whole(folder: Path) -> None:
    """Something of every stage of SmolLM2, and sets of Gemma."""
    ruler = scored("niah_single_2", 2048, {"stock": "r" * 50, "trimix": "r" * 40 + "w" * 10})
    ruler += scored("vt", 2048, {"stock": "w" * 10}) + scored("cwe", 2048, {"stock": "rrww", "trimix": "rrww"})
    put(folder / "smollm2-ruler", "ruler", ruler)
    deep = scored("needle", 2048, {"stock": "rr", "trimix": "rr"}, depth=0.0)
    put(folder / "smollm2-niah", "niah", deep + scored("needle", 2048, {"stock": "rr", "trimix": "rw"}, depth=0.5))
    put(folder / "smollm2-documents", "agreement", compared(2048, {"stock": 0, "noise-floor": 1e-4, "trimix": 0.3}))
    counted = {"stock": 0, "noise-floor": 1e-5, "num_layers=3": 0.01, "num_layers=9": 0.2, "random-3-0": 0.1}
    put(folder / "smollm2-layers", "agreement", compared(2048, {**counted, "random-3-1": 0.3}))
    varied = {"stock": 0, "trimix": 0.05, "last_n=0": 0.3, "last_n=16": 0.1, "shape=window": 0.31, "n_local=64": 0.06}
    put(folder / "smollm2-shape", "agreement", compared(2048, varied))
    needle = scored("needle", 2048, {"stock": "rr", "last_n=0": "ww", "num_layers=3": "rr"}, depth=0.5)
    put(folder / "smollm2-needle-ablation", "niah", needle)
    put(folder / "smollm2-long", "long", long(2048, {"stock": None, "noise-floor": None, "trimix": 100}))
    put(folder / "smollm2-ppl", "ppl", likelihood(2048, {"stock": 2.0, "trimix": 2.5}))
    sets = {"stock": 0, "trimix": 0.1, "layers-5": 0.02, "layers-5-11": 0.04}
    put(folder / "gemma-shape", "agreement", compared(4096, sets))
