"""Suites in our own models' languages: lengths, depths, one right answer, which the models give."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation import tokenizers
from vllm_trimix.demo.languages import RECORDS, VAULT
from vllm_trimix.demo.prompts import make_demo_prompt
from vllm_trimix.evaluation.sample import METRICS, Measure, Sample
from vllm_trimix.evaluation.suite import Context
from vllm_trimix.evaluation.suites.registry import SUITES
from vllm_trimix.patterns.triangle import Triangle

STATEMENT = re.compile(r"The vault code of (\w+) (is|matches) (\w+) \.")
TRAINED = Path(__file__).parents[1] / "data/trained-small"
CASES = [
    (language, suite, task)
    for language in (VAULT, RECORDS)
    for suite in SUITES
    for task in SUITES[suite].tasks[language]
]
# Statements and records are eight tokens and two; a filler sentence at most 16. Other documents have exact lengths.
UNITS = {"niah_single_1": 16, "passkey": 16, "niah_multikey_2": 8, "kv_retrieval": 8}


def context(language: str, **fields: Any) -> Context:
    tokenizer = tokenizers.vault() if language == VAULT else tokenizers.records()
    return Context(tokenizer, language, **fields)


def made(language: str, suite: str, task: str, length: int, count: int, **fields: Any) -> list[Sample]:
    return SUITES[suite].tasks[language][task](context(language, **fields), length, count)


def words(sample: Sample, language: str = VAULT) -> list[str]:
    return list(context(language).tokenizer.convert_ids_to_tokens(sample.prompt))


def test_which_tasks_there_are() -> None:
    assert {suite: sorted(SUITES[suite].tasks[VAULT]) for suite in SUITES} == {
        "ruler": ["niah_multikey_1", "niah_multikey_2", "niah_single_1", "niah_single_2", "vt"],
        "niah": ["needle", "two_hop"],
        "retrieval": ["kv_retrieval", "passkey"],
        "ppl": ["documents"],
        "agreement": ["prompts"],
        "long": ["question"],
    }
    assert {suite: sorted(SUITES[suite].tasks[RECORDS]) for suite in SUITES} == {
        "ruler": ["niah_multikey_2"],
        "niah": ["needle"],
        "retrieval": ["kv_retrieval"],
        "ppl": ["documents"],
        "agreement": ["prompts"],
        "long": [],
    }


@pytest.mark.parametrize(("language", "suite", "task"), CASES)
@pytest.mark.parametrize("length", [900, 901, 1536])
def test_prompt_and_answer_fill_the_length(language: str, suite: str, task: str, length: int) -> None:
    samples = made(language, suite, task, length, 2)
    assert len(samples) == 2 * (11 if suite == "niah" else 1)
    for sample in samples:
        used = len(sample.prompt) + sample.max_tokens
        unit = UNITS.get(task, 1) if language == VAULT else (1 if suite == "ppl" else 4)
        assert length - unit < used <= length
        assert (sample.task, sample.length, sample.comparable) == (task, length, False)
        assert not {"<unk>"} & set(words(sample, language))
    assert len({sample.name for sample in samples}) == len({sample.prompt for sample in samples}) == len(samples)


@pytest.mark.parametrize(("language", "suite", "task"), CASES)
def test_a_seed_names_each_prompt(language: str, suite: str, task: str) -> None:
    few, more = (made(language, suite, task, 1000, count) for count in (1, 3))
    assert set(few) < set(more)
    made(language, suite, task, 1200, 1)
    assert made(language, suite, task, 1000, 1) == few
    assert not {s.prompt for s in few} & {s.prompt for s in made(language, suite, task, 1000, 3, seed=43)}


def one_answer(sample: Sample) -> str:
    """The answer that a document's statements give, each name having one statement, whatever is stated again."""
    text = " ".join(words(sample))
    facts = set(STATEMENT.findall(text))
    assert len({name for name, _, _ in facts}) == len(facts), "a name has two statements"
    assert len({value for _, trigger, value in facts if trigger == "is"}) == sum(
        trigger == "is" for _, trigger, _ in facts
    )
    stated = {name: (trigger, value) for name, trigger, value in facts}
    trigger, value = stated[words(sample)[-2]]
    if trigger == "matches":
        trigger, value = stated[value]
    assert trigger == "is"
    assert text.split().count(value) == 1
    return value


@pytest.mark.parametrize(("suite", "task"), [(s, t) for language, s, t in CASES if language == VAULT and s != "ppl"])
def test_a_document_gives_one_answer(suite: str, task: str) -> None:
    for sample in made(VAULT, suite, task, 1400, 5):
        answer = one_answer(sample)
        assert words(sample)[-6:-2] == "The vault code of".split()
        # Not among the sinks, which every query sees.
        assert words(sample).index(answer) > Triangle.n_init + 6
        if sample.measure == Measure.ANSWER:
            assert sample.references == (answer,)
            assert METRICS[sample.metric](f" {answer} .", sample.references) == 1.0


def test_haystacks_are_what_they_are_called() -> None:
    def counts(suite: str, task: str) -> set[int]:
        return {len(STATEMENT.findall(" ".join(words(s)))) for s in made(VAULT, suite, task, 2000, 5)}

    assert counts("ruler", "niah_single_1") == counts("ruler", "niah_single_2") == counts("retrieval", "passkey") == {1}
    assert counts("ruler", "niah_multikey_1") == {4}
    assert counts("ruler", "niah_multikey_2") == counts("retrieval", "kv_retrieval") == {(2000 - 4 - 1 - 6) // 8}
    repeated = " ".join(words(made(VAULT, "ruler", "niah_single_1", 2000, 1)[0])[1:])
    rest = STATEMENT.sub("", repeated).rpartition("The vault code")[0]
    assert len({sentence.strip() for sentence in rest.split(" . ")} - {""}) == 1
    varied = " ".join(words(made(VAULT, "ruler", "niah_single_2", 2000, 1)[0])[1:])
    assert len(set(varied.split(" . "))) > 50


@pytest.mark.parametrize("task", ["needle", "two_hop"])
def test_records_lie_at_their_depth(task: str) -> None:
    length = 3000
    reach = 1.0 if task == "needle" else 1 - (Triangle.n_local + 2 * Triangle.last_n + 8) / length
    for sample in made(VAULT, "niah", task, length, 2):
        found = words(sample)
        record = found.index(sample.references[0])
        assert sample.depth is not None
        assert abs(record / length - sample.depth * reach) < 0.01
        if task == "two_hop":
            alias = next(i + 1 for i, word in enumerate(found) if word == "matches" and found[i - 1] == found[-2])
            assert alias - record > Triangle.n_local + Triangle.last_n
            assert alias < len(found) - Triangle.last_n
    assert [s.depth for s in made(VAULT, "niah", task, length, 1, depths=(0.25, 0.75))] == [0.25, 0.75]


def test_asked_records_of_the_trained_lie_at_their_depth() -> None:
    for sample in made(RECORDS, "niah", "needle", 1500, 2):
        found = words(sample, RECORDS)
        place = found.index(sample.references[0])
        assert found[-2:] == ["?", found[place - 1]]
        assert found.count(sample.references[0]) == 1
        assert sample.depth is not None
        assert abs(place / len(found) - sample.depth) < 0.01


def test_perplexity_and_agreement_need_no_reference() -> None:
    for language in (VAULT, RECORDS):
        [text] = made(language, "ppl", "documents", 1000, 1)
        assert (len(text.prompt), text.max_tokens, text.measure, text.references) == (999, 1, Measure.PERPLEXITY, ())
        [compared] = made(language, "agreement", "prompts", 1000, 1)
        assert (compared.max_tokens, compared.measure, compared.references) == (16, Measure.AGREEMENT, ())


def test_hops_come_by_turns() -> None:
    for index, sample in enumerate(made(VAULT, "agreement", "prompts", 1000, 4)):
        asked = words(sample)[-2]
        trigger = next(trigger for name, trigger, _ in STATEMENT.findall(" ".join(words(sample))) if name == asked)
        assert trigger == ("is" if index % 2 else "matches")


@pytest.mark.parametrize(
    ("language", "suite", "task", "length", "message"),
    [
        (VAULT, "ruler", "vt", 700, "vt: 700 tokens leave no room: tokens: 696 is too short for a 2-hop document"),
        (VAULT, "ruler", "niah_single_1", 60, "niah_single_1: 60 tokens leave no room: tokens: 56 is too short"),
        (RECORDS, "retrieval", "kv_retrieval", 12, "12 tokens leave no room: the shortest document needs 17"),
        (RECORDS, "niah", "needle", 9000, "9000 tokens: the model's 2048 keys make documents for lengths up to"),
        (RECORDS, "ppl", "documents", 9000, "9000 tokens: the model's 2048 keys make documents up to"),
    ],
)
def test_lengths_that_cannot_be(language: str, suite: str, task: str, length: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        made(language, suite, task, length, 1)


def test_the_longest_document_of_the_trained() -> None:
    with pytest.raises(ValueError, match="lengths up to") as refused:
        made(RECORDS, "niah", "needle", 9000, 1)
    longest = int(re.findall(r"up to (\d+)", str(refused.value))[0])
    assert made(RECORDS, "niah", "needle", longest, 1)
    with pytest.raises(ValueError, match=f"up to {longest}"):
        made(RECORDS, "niah", "needle", longest + 1, 1)


def test_depths_of_demo_prompts() -> None:
    with pytest.raises(ValueError, match=r"depth: 1\.5 is outside 0-1"):
        make_demo_prompt(tokens=900, hops=1, seed=0, depth=1.5)
    for depth in (0.0, 0.31, 0.999, 1.0):
        for tokens in range(900, 930):
            assert make_demo_prompt(tokens=tokens, hops=2, seed=0, depth=depth).tokens == tokens
            assert make_demo_prompt(tokens=tokens, hops=1, seed=0, depth=depth).tokens == tokens


def answered(model: Any, tokenizer: Any, samples: list[Sample]) -> float:
    """The mean score of the next token as the answer."""
    import torch

    scores = []
    for sample in samples:
        with torch.inference_mode():
            last = model(torch.tensor([sample.prompt]), logits_to_keep=1).logits[0, -1]
        answer = tokenizer.decode([int(last.argmax())])
        scores.append(METRICS[sample.metric](answer, sample.references))
    return sum(scores) / len(scores)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("suite", "task"), [(s, t) for language, s, t in CASES if language == VAULT and s in ("ruler", "niah", "retrieval")]
)
def test_the_circuit_answers_all(suite: str, task: str) -> None:
    from tests.probing.models import circuit

    model, tokenizer = circuit()
    samples = SUITES[suite].tasks[VAULT][task](Context(tokenizer, VAULT, depths=(0.0, 0.5, 1.0)), 1100, 2)
    assert answered(model, tokenizer, samples) == 1.0


def test_the_trained_model_answers_most() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(TRAINED).eval(), AutoTokenizer.from_pretrained(TRAINED)
    samples = SUITES["ruler"].tasks[RECORDS]["niah_multikey_2"](Context(tokenizer, RECORDS), 200, 30)
    assert answered(model, tokenizer, samples) > 0.9
