"""The demo prompts: exact lengths, one right answer, and the distances that make two hops need the Middle section."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from functools import cache

import pytest

from vllm_trimix.cli.main import main
from vllm_trimix.demo import vocabulary
from vllm_trimix.demo.prompts import MIN_TOKENS, DemoPrompt, make_demo_prompt
from vllm_trimix.patterns.triangle import Triangle

STATEMENT = re.compile(r"The vault code of (\w+) (is|matches) (\w+)\.")

TOKENIZER = cache(lambda: vocabulary.build_tokenizer(vocabulary.vocabulary()))


def tokenize(prompt: DemoPrompt) -> list[str]:
    """Tokens with BOS, by the tokenizer itself."""
    return list(TOKENIZER().encode(prompt.prompt).tokens)


def position(tokens: list[str], statement: str) -> int:
    """Where a statement's code or second name stands."""
    words = re.findall(r"\w+|\.", statement)
    starts = [i for i in range(len(tokens)) if tokens[i : i + len(words)] == words]
    assert len(starts) == 1
    return starts[0] + 6


def lengths(hops: int) -> list[int]:
    """Every length from the least on, then some real ones."""
    return [*range(MIN_TOKENS[hops], MIN_TOKENS[hops] + 40), 1000, 1024, 2048, 4095]


@pytest.mark.parametrize("hops", [1, 2])
def test_length_is_exact_and_every_word_is_known(hops: int) -> None:
    for tokens in lengths(hops):
        prompt = make_demo_prompt(tokens=tokens, hops=hops, seed=tokens)
        found = tokenize(prompt)
        assert len(found) == prompt.tokens == tokens
        assert found[0] == vocabulary.BOS
        assert vocabulary.UNK not in found


@pytest.mark.parametrize("hops", [1, 2])
def test_the_document_gives_one_answer(hops: int) -> None:
    for seed in range(100):
        prompt = make_demo_prompt(tokens=1500, hops=hops, seed=seed)
        statements = STATEMENT.findall(prompt.prompt)
        names = [name for name, _, _ in statements]
        assert len(names) == len(set(names)), "a name has two statements"
        codes = [value for _, trigger, value in statements if trigger == "is"]
        assert len(codes) == len(set(codes)), "two names share a code by record"
        facts = {name: (trigger, value) for name, trigger, value in statements}
        asked = prompt.question.split()[-2]
        assert prompt.prompt.endswith(prompt.question)
        trigger, value = facts[asked]
        if hops == 2:
            assert (trigger, value) == ("matches", prompt.wrong_answer)
            trigger, value = facts[value]
        else:
            assert prompt.wrong_answer is None
        assert (trigger, value) == ("is", prompt.answer)
        assert any(t == "matches" and n != asked for n, t, _ in statements), "no distractor alias"
        assert sum(t == "is" and v != prompt.answer for _, t, v in statements) >= 3


@pytest.mark.parametrize("hops", [1, 2])
def test_statements_stay_clear_of_the_sinks(hops: int) -> None:
    for tokens in lengths(hops):
        for seed in range(5):
            found = tokenize(make_demo_prompt(tokens=tokens, hops=hops, seed=seed))
            first = found.index("vault") - 1
            assert first >= Triangle.n_init


def test_the_alias_sees_its_record_only_through_the_middle() -> None:
    for tokens in lengths(2):
        for seed in range(5):
            prompt = make_demo_prompt(tokens=tokens, hops=2, seed=seed)
            found = tokenize(prompt)
            asked = prompt.question.split()[-2]
            assert prompt.wrong_answer is not None
            at_record = position(found, vocabulary.record(prompt.wrong_answer, prompt.answer))
            at_alias = position(found, vocabulary.alias(asked, prompt.wrong_answer))
            assert at_alias - at_record > Triangle.n_local + Triangle.last_n
            assert at_alias < tokens - Triangle.last_n


def test_one_hop_records_lie_anywhere() -> None:
    places = []
    for seed in range(60):
        prompt = make_demo_prompt(tokens=2000, hops=1, seed=seed)
        record = vocabulary.record(prompt.question.split()[-2], prompt.answer)
        places.append(position(tokenize(prompt), record))
    assert min(places) < 400
    assert max(places) > 1600


def test_a_seed_names_one_prompt() -> None:
    prompts = {make_demo_prompt(tokens=800, hops=1, seed=seed).prompt for seed in range(20)}
    assert len(prompts) == 20
    assert make_demo_prompt(tokens=800, hops=2, seed=3) == make_demo_prompt(tokens=800, hops=2, seed=3)
    code = "from vllm_trimix.demo.prompts import make_demo_prompt as m; print(m(tokens=800, hops=2, seed=3).prompt)"
    other_process = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "5"},
    )
    assert other_process.stdout.strip() == make_demo_prompt(tokens=800, hops=2, seed=3).prompt


def test_long_prompts_are_quick() -> None:
    start = time.process_time()
    make_demo_prompt(tokens=32768, hops=2, seed=0)
    assert time.process_time() - start < 0.5


def test_prompts_need_neither_torch_nor_transformers() -> None:
    code = (
        "import argparse, sys; from vllm_trimix.cli import make_demo_prompt, make_demo_model, make_bench_model;"
        "sub = argparse.ArgumentParser().add_subparsers();"
        "[module.add_parser(sub) for module in (make_demo_prompt, make_demo_model, make_bench_model)];"
        "make_demo_prompt.make_demo_prompt(tokens=900, hops=2, seed=0);"
        "print(sorted({'torch', 'transformers', 'tokenizers', 'vllm'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONPATH": ":".join(sys.path)}
    )
    assert done.stdout.strip() == "[]"


def test_names_and_fillers_do_not_clash() -> None:
    assert len(vocabulary.NAMES) >= 150
    assert len(set(vocabulary.vocabulary())) == len(vocabulary.vocabulary())
    filler = {word for words in vocabulary.SLOTS.values() for word in words}
    filler |= {word for template in vocabulary.FILLER_TEMPLATES for word in template.split()}
    assert not filler & {*vocabulary.NAMES, *vocabulary.TRIGGERS}


@pytest.mark.parametrize("hops", [1, 2])
def test_too_short_names_the_minimum(hops: int) -> None:
    least = MIN_TOKENS[hops]
    with pytest.raises(ValueError, match=rf"tokens: {least - 1} is too short for a {hops}-hop .* minimum is {least} "):
        make_demo_prompt(tokens=least - 1, hops=hops, seed=0)


def test_unknown_hops() -> None:
    with pytest.raises(ValueError, match="hops: 3 is not supported; choose 1"):
        make_demo_prompt(tokens=2000, hops=3, seed=0)


def test_command_prints_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-demo-prompt", "--tokens", "900", "--hops", "2", "--seed", "4"]) == 0
    printed = json.loads(capsys.readouterr().out)
    expected = make_demo_prompt(tokens=900, hops=2, seed=4)
    assert printed == {
        "prompt": expected.prompt,
        "answer": expected.answer,
        "wrong_answer": expected.wrong_answer,
        "hops": 2,
        "tokens": 900,
        "seed": 4,
        "question": expected.question,
    }


def test_command_prints_text(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-demo-prompt", "--tokens", "900", "--format", "text"]) == 0
    assert capsys.readouterr().out == make_demo_prompt(tokens=900, hops=1, seed=0).prompt + "\n"


def test_command_reports_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-demo-prompt", "--tokens", "20"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("vllm-trimix: error: tokens: 20 is too short")
    assert captured.err.count("\n") == 1
    assert captured.out == ""
