"""Tasks, screening, pieces of documents and the schedule: what is asked, and how much of it."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest

from tests.probing.models import circuit
from vllm_trimix.demo.languages import ENGLISH, RECORDS, VAULT
from vllm_trimix.probing import documents, schedule
from vllm_trimix.probing.screening import ASKED, screen
from vllm_trimix.probing.tasks import tasks_of


@pytest.mark.parametrize("task", tasks_of(ENGLISH), ids=lambda task: task.name)
def test_the_answer_lies_in_the_middle_half(task: Any) -> None:
    for seed in range(40):
        question = task.write(random.Random(seed), 200)
        asked, tail = question.text.rsplit("\n", 1)
        answer = question.answer.strip()
        assert answer not in tail
        assert 0.15 < asked.index(answer) / len(asked) < 0.85
        assert question.prefix


def test_more_needles_are_harder_to_tell_apart() -> None:
    counts = {task.name: task.write(random.Random(1), 200).text.count("magic number") for task in tasks_of(ENGLISH)}
    assert (counts["needle"], counts["few_needles"], counts["multi_needle"]) == (3, 5, 10)


def test_own_languages_are_asked_their_own_tasks() -> None:
    assert [task.name for task in tasks_of(VAULT)] == ["1_hop", "2_hop"]
    [record] = tasks_of(RECORDS, keys=128)
    assert record.write(random.Random(0), 200).answer.startswith("v")


def test_screening_ends_when_it_is_settled() -> None:
    def answers(*right: bool) -> Any:
        return [lambda right=one: asked.append(right) or right for one in right]

    asked: list[bool] = []
    solved = screen("needle", 2048, answers(True, False, True, True))
    assert (solved.right, solved.asked, solved.solved) == (3, ASKED, True)
    asked.clear()
    failed = screen("needle", 2048, answers(False, False, True, True))
    assert (failed.right, failed.asked, failed.solved, len(asked)) == (0, 2, False, 2)
    assert failed.words == "needle 0 of 2 at 2048 tokens"


def test_pieces_are_apart_while_there_is_room(tmp_path: Path) -> None:
    tokenizer = circuit(layers=4, lookup=1, answer=2)[1]
    words = [f"{'amber' if index % 2 else 'birch'}" for index in range(1000)]
    paths = [tmp_path / "a.txt", tmp_path / "b.txt", tmp_path / "short.txt"]
    for path, count in zip(paths, (1000, 500, 20), strict=True):
        path.write_text(" ".join(f"{word}" for word in words[:count]))
    found = documents.pieces(paths, tokenizer, length=101, count=15, seed=0)
    assert {len(piece) for piece in found} == {101}
    # BOS begins each, as the tokenizer would have it.
    assert {piece[0] for piece in found} == {tokenizer.bos_token_id}
    more = documents.pieces(paths, tokenizer, length=101, count=20, seed=0)
    assert more[:15] == found
    with pytest.raises(ValueError, match="--lengths: 2000 tokens: the longest of the --documents has 1000"):
        documents.pieces(paths, tokenizer, length=2000, count=1, seed=0)


def test_pieces_of_a_text_without_repetition_are_different(tmp_path: Path) -> None:
    tokenizer = circuit(layers=4, lookup=1, answer=2)[1]
    vocabulary = [word for word, _ in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])][10:1010]
    path = tmp_path / "a.txt"
    path.write_text(" ".join(word for word in vocabulary if word.isalnum()))
    tokens = tokenizer(path.read_text(), add_special_tokens=False).input_ids
    found = documents.pieces([path], tokenizer, length=51, count=len(tokens) // 50 - 1, seed=3)
    places = sorted(tokens.index(piece[1]) for piece in found)
    assert all(later - earlier >= 50 for earlier, later in itertools.pairwise(places))


def work(**changes: Any) -> schedule.Work:
    settings: dict[str, Any] = {
        "pass_seconds": {2048: 2.0, 4096: 5.0},
        "scored": 6,
        "layers": 30,
        "gradient": True,
        "ablation": False,
        "orders": 1,
        "compared": 3,
        "reuses": True,
    }
    return schedule.Work(**{**settings, **changes})


def test_a_time_budget_decides_the_prompts() -> None:
    plain = work()
    for budget in (500, 700, 1200):
        samples = plain.samples_within(budget, most=500)
        assert plain.choosing_seconds(samples) <= budget < plain.choosing_seconds(samples + 1)
    assert plain.samples_within(1, most=64) == schedule.LEAST
    assert plain.samples_within(1e9, most=64) == 64
    assert plain.samples_within(1e9, most=5) == 5


@pytest.mark.parametrize(
    "changes",
    [
        {"ablation": True},
        {"orders": 2},
        {"reuses": False},
        {"pass_seconds": {2048: 2.0, 4096: 6.0}},
        {"scored": 7},
        {"compared": 4},
    ],
)
def test_more_work_takes_longer(changes: dict[str, Any]) -> None:
    assert seconds(work(**changes)) > seconds(work())


def seconds(asked: schedule.Work) -> float:
    return asked.ranking_seconds() + asked.choosing_seconds(24)


def test_what_surely_takes_longer_is_refused() -> None:
    plain = work()
    least = plain.ranking_seconds() + plain.choosing_seconds(schedule.LEAST)
    schedule.refuse(plain, least + 1, most=64)
    schedule.refuse(plain, math.inf, most=64)
    with pytest.raises(ValueError, match=r"minutes: even 8 held-out prompts of each length take about"):
        schedule.refuse(plain, least - 1, most=64)
    # Fewer were asked for.
    schedule.refuse(plain, least - 1, most=4)


def test_deep_sets_leave_time_for_more_prompts() -> None:
    assert work(share=0.3).samples_within(700, most=500) > work(share=0.9).samples_within(700, most=500)
    assert work(share=0.3, reuses=False).choosing_seconds(24) == work(share=0.9, reuses=False).choosing_seconds(24)


def test_times_are_said_as_people_say_them() -> None:
    assert [schedule.words(seconds) for seconds in (0.2, 40, 600, 9000)] == [
        "2 seconds",
        "40 seconds",
        "10 minutes",
        "2.5 hours",
    ]
