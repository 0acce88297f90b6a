"""Generated and given prompts: exact lengths, answers in the middle, errors that name the line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing.prompts import check_lengths, describe, generate, read, tasks_for

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture
def tokenizer() -> Any:
    """A token for each word, digit and sign; every character has an id."""
    vocab = {"<unk>": 0, "<s>": 1, **{chr(code): code for code in range(2, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_prompts_fill_the_length(tokenizer: Any, template: str | None) -> None:
    tokenizer.chat_template = template
    tasks = tasks_for(tokenizer)
    names = ["needle", "passkey", "few_needles", "multi_needle", "kv_retrieval"]
    prompts = generate(tokenizer, tasks, length=6000, count=10, seed=7)
    assert [prompt.kind for prompt in prompts] == names * 2
    for prompt in prompts:
        assert 0.95 * 6000 < len(prompt.sample.prompt) <= 6000
        # What is asked for stands once (a pass key twice, side by side), far from both ends.
        place = prompt.text.index(prompt.answer)
        assert prompt.text.count(prompt.answer.strip()) == (2 if prompt.kind == "passkey" else 1)
        assert 0.1 < place / len(prompt.text) < 0.9
        assert tokenizer.decode(prompt.sample.answer) == prompt.answer
        assert prompt.text.startswith("<s><user>") is (template is not None)
        # The answer's beginning is given, so that the answer itself comes next.
        assert prompt.text.endswith((" is", ' is "'))
    assert generate(tokenizer, tasks, length=6000, count=10, seed=7) == prompts
    assert len({prompt.answer for prompt in prompts + generate(tokenizer, tasks, length=6000, count=10, seed=8)}) == 20
    assert next(iter(describe(prompts))).startswith("2 few_needles, 5")


def test_a_template_brings_its_own_start(tokenizer: Any) -> None:
    tokenizer.chat_template = TEMPLATE
    tokens = generate(tokenizer, tasks_for(tokenizer), length=2000, count=1, seed=0)[0].sample.prompt
    assert (tokens[0], tokens.count(tokenizer.bos_token_id)) == (tokenizer.bos_token_id, 1)


def test_too_short(tokenizer: Any) -> None:
    with pytest.raises(
        ValueError, match=r"--lengths: 300 tokens leave no room for a kv_retrieval prompt; the shortest"
    ):
        generate(tokenizer, tasks_for(tokenizer)[-1:], length=300, count=2, seed=0)
    prompts = generate(tokenizer, tasks_for(tokenizer)[-1:], length=1500, count=1, seed=0)
    with pytest.raises(ValueError, match=r"prompt 1 has 14\d\d tokens: the triangle hides nothing up to 1648"):
        check_lengths(prompts, Triangle(n_local=1512), max_length=None)
    with pytest.raises(ValueError, match=r"prompt 1 has 14\d\d tokens: the model takes 512"):
        check_lengths(prompts, Triangle(), max_length=512)


def test_given_prompts(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a b", "answer": "c"}\n\n{"prompt": "d", "answer": "ef"}\n')
    prompts = read(path, tokenizer)
    assert [(p.text, p.answer, len(p.sample.prompt), len(p.sample.answer)) for p in prompts] == [
        ("a b", "c", 3, 1),
        ("d", "ef", 1, 2),
    ]
    tokenizer.chat_template = TEMPLATE
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hi"}], "answer": "x"}))
    assert read(path, tokenizer)[0].text == "<s><user>hi<assistant>"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompts"),
        ("nonsense", "line 1: not JSON"),
        (
            '{"prompt": "a", "answer": "b"}\n[1]',
            'line 2: expected an object like {"prompt": ..., "answer": ...}, got [1]',
        ),
        ('{"prompt": "a", "answer": ""}', 'line 1: there is no answer: write it as "answer"'),
        ('{"prompt": 3, "answer": "b"}', 'line 1: neither "prompt" (a text) nor "messages" (a list)'),
        ('{"messages": [{"role": "user"}], "answer": "b"}', 'has no chat template for "messages"'),
    ],
)
def test_bad_files(tokenizer: Any, tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        read(path, tokenizer)


def test_a_template_that_refuses(tokenizer: Any, tmp_path: Path) -> None:
    tokenizer.chat_template = "{{ raise_exception('no system turn') }}"
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"messages": [{"role": "system", "content": "a"}], "answer": "b"}')
    with pytest.raises(ValueError, match=r"line 1: the tokenizer's chat template refuses it: .*no system turn"):
        read(path, tokenizer)
