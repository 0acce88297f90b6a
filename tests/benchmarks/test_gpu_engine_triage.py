"""What the GPU run says of an engine whose answers are off."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.gpu.report import load
from tests.benchmarks.failing import make_report


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("transformers", reason="the truth is Hugging Face's")
    from benchmarks.gpu.small_model import save_small_model

    return save_small_model(tmp_path_factory.mktemp("small"))


# Sinks 4, window 16, last rows 8; chunks of 32 tokens.
PROMPTS = [20, 60, 72]


def served(small: Path, mistake: str, *, only: Any = lambda request: True) -> tuple[list[Any], Any]:
    """A wave, and what an engine with a mistake in some of its requests would have answered."""
    from benchmarks.gpu import triage
    from benchmarks.gpu.small_model import prompts
    from tests.engine.ledger import Chunk
    from tests.engine.models import true_logprobs
    from tests.engine.run import both_ways

    wave, answers, chunks = both_ways(prompts(PROMPTS), max_tokens=3), [], []
    for index, request in enumerate(wave):
        layers, pattern = triage._MISTAKES[mistake] if only(request) else triage._own(request)
        tokens = [7, 8, 9]
        logprobs = true_logprobs(small, request["prompt"], tokens, layers=layers, pattern=pattern)
        answers.append({"tokens": tokens, "logprobs": [value + 1e-6 for value in logprobs]})
        size = len(request["prompt"])
        chunks += [Chunk(index, first, min(32, size - first), 0, 0) for first in range(0, size, 32)]
    return wave, SimpleNamespace(waves=[answers], ledgers=[SimpleNamespace(chunks=chunks)])


def under_triangle(request: dict[str, Any]) -> bool:
    return request["extra_args"] is None


@pytest.mark.parametrize(
    "mistake", ["all rows dense", "without sinks", "without dense last rows", "with a window one key short"]
)
def test_engine_answers_by_a_wrong_rule(tmp_path: Path, small: Path, mistake: str) -> None:
    from benchmarks.gpu.triage import triage_engine

    wave, result = served(small, mistake, only=under_triangle)
    said = triage_engine(make_report(tmp_path, runner="v2", graphs=True), "float16", small, wave, result)
    # A prompt of 20 tokens hides nothing but under a shorter window or without last rows.
    assert f"right if computed {mistake}" in said
    assert "0 of them opted out" in said
    assert "request 2 (60 tokens, triangle): token 0 is the first of 3 wrong ones" in said
    saved = load(tmp_path / "kernel_reference.json")
    assert saved is not None
    assert saved["triage_float16"]["graphs"]
    assert saved["triage_float16"]["line"] == said


def test_engine_answers_of_those_that_opted_out(tmp_path: Path, small: Path) -> None:
    from benchmarks.gpu.triage import triage_engine

    wave, result = served(small, "masked as if not opted out")
    said = triage_engine(make_report(tmp_path), "x", small, wave, result, budget=1e-4)
    assert "2 of 6 requests are wrong, 2 of them opted out" in said
    assert "right if computed masked as if not opted out" in said


def test_engine_answers_of_straddling_chunks(tmp_path: Path, small: Path) -> None:
    from benchmarks.gpu.triage import triage_engine

    wave, result = served(small, "all rows dense", only=lambda r: under_triangle(r) and len(r["prompt"]) == 60)
    said = triage_engine(make_report(tmp_path), "x", small, wave, result)
    # 72 tokens are chunks of 32, 32 and 8: the last rows are a chunk of their own.
    assert "exactly those that are under the triangle with a chunk that straddles the last rows" in said


def test_engine_answers_that_are_no_numbers_from_the_second_token_on(tmp_path: Path, small: Path) -> None:
    from benchmarks.gpu.triage import triage_engine

    wave, result = served(small, "all rows dense", only=lambda request: False)
    result.waves[0][4]["logprobs"][1] = float("nan")
    said = triage_engine(make_report(tmp_path), "x", small, wave, result)
    assert "1 of 6 requests are wrong, 0 of them opted out" in said
    assert "request 4 (72 tokens, triangle): token 1 is the first of 1 wrong ones, 1 of 3 are no numbers" in said
    assert "first tokens are right: decode, not prefill" in said


@pytest.mark.parametrize(
    ("right", "graphs", "reruns", "verdict"),
    [
        ({"eager": False, "graphs": True}, True, 2, "alone and eager it is wrong as well"),
        ({"eager": True, "graphs": False}, True, 2, "alone it is right eagerly and wrong with graphs"),
        ({"eager": True, "graphs": True}, True, 2, "right, eagerly and with graphs: only in a batch"),
        ({"eager": True}, True, 1, "alone and eager it is right: only in a batch, or only under graphs"),
        ({"eager": True}, False, 2, "alone and eager it is right: only in a batch"),
        ({}, True, 0, "no engine was started again"),
        ({"eager": None, "graphs": True}, True, 2, "an engine failed: eager: AssertionError: no memory"),
    ],
)
def test_engine_answers_alone(
    tmp_path: Path, small: Path, right: dict[str, bool | None], graphs: bool, reruns: int, verdict: str
) -> None:
    from benchmarks.gpu.triage import triage_engine

    wave, wrong = served(small, "all rows dense", only=under_triangle)
    _, fine = served(small, "all rows dense", only=lambda request: False)
    asked = []

    def rerun(requests: list[dict[str, Any]], with_graphs: bool) -> Any:
        way = "graphs" if with_graphs else "eager"
        asked.append(way)
        assert right[way] is not None, "no memory"
        [number] = [index for index, request in enumerate(wave) if [request] == requests]
        assert number == 2, "the shortest that is wrong"
        return SimpleNamespace(waves=[[(fine if right[way] else wrong).waves[0][number]]])

    said = triage_engine(make_report(tmp_path, graphs=graphs, reruns=reruns), "x", small, wave, wrong, rerun=rerun)
    assert asked == list(right)
    assert verdict in said.rsplit("; ", 1)[1]
