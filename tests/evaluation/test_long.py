"""Long answers: prompts that leave them room, checks of their form, what is counted of their tokens."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.evaluation import tokenizers
from vllm_trimix.demo.languages import ENGLISH
from vllm_trimix.evaluation import cells
from vllm_trimix.evaluation.answers import Answer, answer_of
from vllm_trimix.evaluation.sample import METRICS, Sample
from vllm_trimix.evaluation.statistics import repetition
from vllm_trimix.evaluation.suite import Context
from vllm_trimix.evaluation.suites.registry import SUITES

TASKS = SUITES["long"].tasks[ENGLISH]


def made(task: str, count: int, *, length: int = 2000, seed: int = 42) -> list[Sample]:
    return TASKS[task](Context(tokenizers.english(), seed=seed), length, count)


def text_of(sample: Sample) -> str:
    text: str = tokenizers.english().decode(sample.prompt)
    return text


@pytest.mark.parametrize("task", TASKS)
def test_prompts_leave_room_for_the_answer(task: str) -> None:
    few, more = made(task, 1), made(task, 3)
    assert few == more[:1]
    assert len({sample.prompt for sample in [*more, *made(task, 3, seed=43)]}) == 6
    for sample in more:
        assert 2000 - 80 < len(sample.prompt) + sample.max_tokens <= 2000
        assert sample.max_tokens == 512
        assert sample.keeps_tokens
        assert sample.references
    with pytest.raises(ValueError, match=f"{task}: 530 tokens leave no room"):
        made(task, 1, length=530)


def test_records_are_the_first_of_the_prompt() -> None:
    for sample in made("records", 3):
        lines = [line for line in text_of(sample).splitlines() if line.startswith("{")]
        assert list(sample.references) == lines[:12]
        assert [json.loads(line)["id"] for line in lines] == list(range(1, len(lines) + 1))
        # All of them fit into the answer.
        assert len(tokenizers.english()("\n".join(sample.references)).input_ids) <= sample.max_tokens
        assert METRICS[sample.metric]("\n".join(lines), sample.references) == 1.0


@pytest.mark.parametrize(
    ("metric", "answer", "references", "score"),
    [
        ("copied_records", '{"a": 1}\n {"b": 2, "c": 3}\n', ('{"a": 1}', '{"b": 2, "c": 3}'), 1.0),
        ("copied_records", '\n\n{"a": 1}\n{"b": 2, "c": 4}', ('{"a": 1}', '{"b": 2, "c": 3}'), 0.75),
        ("copied_records", '{"b": 2}\n{"a": 1}', ('{"a": 1}', '{"b": 2}'), 0.0),
        ("copied_records", '["a"]\n{"b": 2, ', ('{"a": 1}', '{"b": 2}'), 0.0),
        ("copied_records", "[" * 100_000, ('{"a": 1}',), 0.0),
        ("copied_records", "", ('{"a": 1}',), 0.0),
        ("numbered_lines", "1. A\n2. B\n3. C\n4. cu", ("1",), 1.0),
        ("numbered_lines", "1) A\n\n2) B\n2) B\n3) C\nend", ("1",), 0.75),
        ("numbered_lines", "1. A\n1. A\n1. A\n1. A\n1. A", ("1",), 0.25),
        ("numbered_lines", "10. A\nB", ("1",), 0.0),
        ("numbered_lines", " ", ("1",), 0.0),
        ("headings", "Section 1\nA.\n## Section 2: B\n**Section 3**", ("Section 1", "Section 2", "Section 3"), 1.0),
        ("headings", "Section 2\nSection 1", ("Section 1", "Section 2"), 0.5),
        ("headings", "As section 1 says", ("Section 1",), 0.0),
    ],
)
def test_forms(metric: str, answer: str, references: tuple[str, ...], score: float) -> None:
    assert METRICS[metric](answer, references) == score


def test_repetition_counts_runs_of_four() -> None:
    assert repetition([1, 2, 3]) == 0.0
    assert repetition([1, 2, 3, 4, 5, 6, 7]) == 0.0
    assert repetition([1, 2, 3, 4] * 2) == pytest.approx(1 / 5)
    assert repetition([7] * 104) == pytest.approx(100 / 101)


def _answer(name: str, index: int, tokens: list[int]) -> Answer:
    sample = Sample("list", 2048, index, (1, 2), ("1",), metric="numbered_lines", max_tokens=512, keeps_tokens=True)
    said: dict[str, Any] = {"text": "1. A", "tokens": tokens, "seconds": 1.0}
    return answer_of(name, "s", sample, said)


def test_agreement_is_counted_by_position() -> None:
    whole = list(range(300))
    answers = [
        *(_answer("stock", index, whole) for index in range(3)),
        # The same; another token in the 65th place; an end after 20 tokens.
        *(_answer("trimix", index, tokens) for index, tokens in enumerate((whole, [*whole[:64], 0], whole[:20]))),
    ]
    found = {result.configuration: result for result in cells.results(answers, {"stock": None, "trimix": None})}
    assert found["trimix"].agrees == pytest.approx({"1": 1, "16": 1, "64": 2 / 3, "128": 1 / 3, "256": 1 / 3})
    assert found["stock"].agrees == {}
    assert found["stock"].repeated == found["trimix"].repeated == 0.0


def test_a_sample_without_tokens_keeps_its_digest() -> None:
    """Answers of earlier versions go on counting."""
    plain = Sample("niah_single_1", 4096, 0, (1, 2, 3), ("7",))
    assert plain.digest == "013c10bb51df4e73"
    assert Sample("niah_single_1", 4096, 0, (1, 2, 3), ("7",), keeps_tokens=True).digest != plain.digest
