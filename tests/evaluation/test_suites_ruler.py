"""RULER through lm-evaluation-harness: its own texts and scores, within the length, seeded and quiet."""

from __future__ import annotations

import importlib.util
import random
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.evaluation import tokenizers
from vllm_trimix.demo.languages import ENGLISH
from vllm_trimix.evaluation import documents, haystack, lm_eval_ruler, reach
from vllm_trimix.evaluation.sample import METRICS, Sample
from vllm_trimix.evaluation.suite import Context, Unavailable
from vllm_trimix.evaluation.suites.registry import SUITES
from vllm_trimix.evaluation.suites.ruler import OWN_SOURCE, TASKS

pytest.importorskip("lm_eval", reason="lm-eval makes the prompts (extra eval)")

PUBLISHED = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
GENERATED = {"niah": 128, "vt": 30, "cwe": 120, "fwe": 50, "qa": 32}
LENGTH = 2400


def made(task: str, length: int = LENGTH, count: int = 2, **fields: Any) -> list[Sample]:
    tokenizer = tokenizers.english(tokenizers.TEMPLATE if fields.get("chat") else None)
    return SUITES["ruler"].tasks[ENGLISH][task](Context(tokenizer, **fields), length, count)


def text_of(sample: Sample) -> str:
    text: str = tokenizers.english().decode(sample.prompt)
    return text


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("task", TASKS)
def test_within_the_length_and_quiet(task: str, chat: bool, capfd: pytest.CaptureFixture[str]) -> None:
    states = random.getstate(), np.random.get_state()[1].tolist()
    samples = made(task, chat=chat)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states
    assert capfd.readouterr() == ("", "")
    assert len(samples) == 2
    for sample in samples:
        assert sample.max_tokens == GENERATED[task.partition("_")[0]]
        assert 0.4 * LENGTH < len(sample.prompt) + sample.max_tokens <= LENGTH
        text = text_of(sample)
        assert text.startswith("<s><user>") is chat
        assert sample.references
        assert all(reference in text for reference in sample.references)
        assert METRICS[sample.metric](text, sample.references) == 1.0
        published = task in PUBLISHED
        assert sample.comparable is published
        assert sample.source.startswith("lm-eval 0." if published else "own: ")


@pytest.mark.parametrize("task", PUBLISHED)
def test_a_seed_names_each_prompt(task: str) -> None:
    few = made(task, count=1)
    more = made(task, count=3)
    assert few == more[:1]
    random.seed(5)
    np.random.seed(5)
    made(task, length=3000, count=1)
    assert made(task, count=1) == few
    assert len({sample.prompt for sample in [*more, *made(task, count=3, seed=43)]}) == 6


ENDS = {
    "niah_single_1": r"\nWhat is the special magic number for ([\w-]+) mentioned in the provided text\? The special "
    r"magic number for \1 mentioned in the provided text is",
    "niah_multikey_3": r"\nWhat is the special magic uuid for ([0-9a-f-]{36}) mentioned in the provided text\? The "
    r"special magic uuid for \1 mentioned in the provided text is",
    "vt": r"\nQuestion: Find all variables that are assigned the value (\d{5}) in the text above\. Answer: According "
    r"to the chain\(s\) of variable assignment in the text above, 5 variables are assgined the value \1, they are:",
    "cwe": r"\nQuestion: What are the 10 most common words in the above list\?\n\nAnswer: The top 10 words that appear "
    r"most often in the list are:",
    "fwe": r"\nQuestion: Do not provide any explanation\. Please ignore the dots '\.\.\.\.'\. What are the three most "
    r"frequently appeared words in the above coded text\? Answer: According to the coded text above, the three most "
    r"frequently appeared words are:",
}


@pytest.mark.parametrize("task", ENDS)
def test_prompts_as_published(task: str) -> None:
    for sample in made(task):
        assert re.search(ENDS[task] + "$", text_of(sample))
    turns = text_of(made(task, chat=True, count=1)[0])
    question, _, prefix = turns.partition("<assistant>")
    assert question.startswith("<s><user>")
    # The delimiter between question and answer is the template's.
    joint = "\n\n" if task == "cwe" else " "
    assert re.search(ENDS[task] + "$", question + joint + prefix)


def test_our_templates_are_lm_evals() -> None:
    niah, qa = lm_eval_ruler._module("niah"), lm_eval_ruler._module("qa")
    assert niah.TEMPLATE.replace("type_needle_v", "kind") == haystack.TEMPLATE
    assert (qa.TEMPLATE, qa.CONFIG["tokens_to_generate"]) == (documents.TEMPLATE, documents.ANSWER_TOKENS)
    assert qa.CONFIG["answer_prefix"] == documents.PREFIX
    prepare = niah.prepare_niah
    text, [value], query = prepare.generate_input_output(
        3, prepare.get_haystack(type_haystack="repeat"), type_haystack="repeat", num_needle_k=1, type_needle_k="words",
        num_needle_v=1, type_needle_v="numbers", template=niah.TEMPLATE,
    )  # fmt: skip
    ours = haystack.needles()("seed", 5, 0.5)
    key = re.findall(r"for ([\w-]+) mentioned", ours.text)[0]
    assert text.partition("\n")[0] == ours.text.partition("\n")[0]
    assert text.rpartition("\n")[2].replace(query, "KEY") == ours.text.rpartition("\n")[2].replace(key, "KEY")
    assert haystack.NEEDLE.format(kind="numbers", key=query, value=value) in text


_TEXTS = st.text("aB1 \n.é", max_size=12)


@given(_TEXTS, st.lists(_TEXTS, min_size=1, max_size=4))
def test_scores_are_lm_evals(answer: str, references: list[str]) -> None:
    scores = lm_eval_ruler._module("common")
    assert METRICS["all"](answer, tuple(references)) == pytest.approx(scores.string_match_all([answer], [references]))
    # For questions lm-eval takes the share of the references that occur; RULER takes the best, as we do.
    each = [scores.string_match_part([answer], [[reference]]) for reference in references]
    assert METRICS["any"](answer, tuple(references)) == max(each)


@pytest.mark.parametrize(("task", "length"), [(task, 150) for task in TASKS] + [("cwe", 500), ("vt", 700)])
def test_no_room(task: str, length: int) -> None:
    with pytest.raises(ValueError, match=rf"{task}: {length} tokens leave no room"):
        made(task, length, 1)


def test_essays_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = lm_eval_ruler._module("niah").prepare_niah
    words = " ".join(haystack.prose(random.Random(1), 3000)).split()
    monkeypatch.setattr(lm_eval_ruler, "_essays", lambda: words)
    monkeypatch.setattr(prepare, "sent_tokenize", lambda text: re.split(r"(?<=\.) ", text))
    prepare.cached_sent_tokenize.cache_clear()
    for task, references in (("niah_single_2", 1), ("niah_multivalue", 4), ("niah_multiquery", 4)):
        given = Context(tokenizers.english())
        samples = SUITES["ruler"].tasks[ENGLISH][task](given, LENGTH, 2)
        assert [(s.comparable, len(s.references), s.max_tokens) for s in samples] == [(True, references, 128)] * 2
        assert all(len(sample.prompt) + 128 <= LENGTH for sample in samples)
        assert given.notes == []


def test_questions_where_they_can_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [" ".join(haystack.prose(random.Random(seed), 4)) for seed in range(200)]
    questions = [{"query": f"Who is {n}?", "outputs": [texts[n][:8]], "context": [n]} for n in range(9)]
    monkeypatch.setattr(lm_eval_ruler, "_questions", lambda task: (questions, texts))
    samples = made("qa_1", count=3)
    assert [(s.comparable, s.metric, s.max_tokens) for s in samples] == [(True, "any", 32)] * 3
    for number, sample in enumerate(samples):
        assert 0.8 * LENGTH < len(sample.prompt) + 32 <= LENGTH
        assert text_of(sample).endswith(f"Question: Who is {number}? Answer:")


def test_without_a_network_the_user_is_told() -> None:
    given = Context(tokenizers.english())
    [sample] = SUITES["ruler"].tasks[ENGLISH]["niah_single_2"](given, LENGTH, 1)
    assert (sample.source, sample.comparable) == (OWN_SOURCE, False)
    [note] = given.notes
    assert note.startswith("niah_single_2: our own prompts, not to be compared with published scores: ")
    assert "baber/paul_graham_essays" in note


def test_addresses_are_asked_before_lm_eval_fetches(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(reach, "reachable", lambda address: asked.append(address))
    fresh = reach.once(lm_eval_ruler._questions.__wrapped__)
    for task in ("qa_1", "qa_2"):
        with pytest.raises(Unavailable, match=r"https://.* can't be reached"):
            fresh(task)
    assert [address.split("/")[2] for address in asked] == ["rajpurkar.github.io", "huggingface.co"]


def test_without_lm_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else found(name))
    for task in TASKS:
        with pytest.raises(Unavailable, match=r"need lm_eval: pip install 'vllm-trimix\[eval\]'"):
            made(task)
