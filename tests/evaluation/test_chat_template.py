"""Conversations in chat templates of every published manner: thinking off, thoughts closed, contents and roles."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.tokenizers import characters
from vllm_trimix.evaluation.making import Asked, tokens_of
from vllm_trimix.evaluation.suite import Context
from vllm_trimix.measurement.chat_template import check_arguments, has_template, in_use, render, thought_end
from vllm_trimix.measurement.tokenizers import load_tokenizer
from vllm_trimix.probing import prompts

TURNS = "{{ bos_token }}{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
ASK = "{% if add_generation_prompt %}[assistant]%s{% endif %}"
QUESTION = [{"role": "user", "content": "Where? <think>"}]
# Name -> what the template writes where the answer begins, the arguments that switch thinking off, how it then ends.
MANNERS: dict[str, tuple[str, dict[str, Any], str]] = {
    "none": ("", {}, "[assistant]"),
    "empty thought when off": (
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}",
        {"enable_thinking": False},
        "[assistant]<think>\n\n</think>\n\n",
    ),
    "open unless off": (
        "{% if enable_thinking is defined and not enable_thinking %}</think>{% else %}<think>{% endif %}",
        {"enable_thinking": False},
        "[assistant]</think>",
    ),
    "default set inside": (
        "{% if thinking is not defined %}{% set thinking = true %}{% endif %}{% if thinking %}<think>{% endif %}",
        {"thinking": False},
        "[assistant]",
    ),
    "budget": (
        "{% if thinking_budget is defined and thinking_budget == 0 %}<seed:think></seed:think>{% else %}<seed:think>"
        "{% endif %}",
        {"thinking_budget": 0},
        "[assistant]<seed:think></seed:think>",
    ),
    "mode in words": (
        "{% set mode = thinking_mode if thinking_mode is defined else 'adaptive' %}{% if mode == 'disabled' %}"
        "</mm:think>{% else %}<mm:think>{% endif %}",
        {"thinking_mode": "disabled"},
        "[assistant]</mm:think>",
    ),
    "effort with none": (
        "{% if reasoning_effort in ['none', 'high'] %}{{ reasoning_effort }}{% endif %}",
        {"reasoning_effort": "none"},
        "[assistant]none",
    ),
    "effort of its own words": (
        "{% if reasoning_effort not in ['high', 'low', 'no_think'] %}{% set reasoning_effort = 'high' %}{% endif %}"
        "{% if reasoning_effort == 'no_think' %}</think>{% else %}<think>{% endif %}",
        {"reasoning_effort": "no_think"},
        "[assistant]</think>",
    ),
    "reasoning": (
        "{% if not reasoning %}<|START_THINKING|><|END_THINKING|>{% else %}<|START_THINKING|>{% endif %}",
        {"reasoning": False},
        "[assistant]<|START_THINKING|><|END_THINKING|>",
    ),
    "switched off by a yes": (
        "{% if disable_thinking %}{% else %}<thinking>{% endif %}",
        {"disable_thinking": True},
        "[assistant]",
    ),
    "always open": ("<think>\n", {}, "[assistant]<think>\n\n</think>\n\n"),
    "always open, in brackets": ("[THINK]", {}, "[assistant][THINK][/THINK]"),
    "always open, of two words": ("<|begin_of_thought|>", {}, "<|begin_of_thought|><|end_of_thought|>"),
    "always open, with words behind": ("<thought>\nWell, ", {}, "<thought>\nWell, \n</thought>\n\n"),
    "always open, one inside": ("<a:think><a:cot>0</a:cot>", {}, "</a:cot>\n</a:think>\n\n"),
    "channels": (
        "{% if not reasoning_effort %}{% set reasoning_effort = 'medium' %}{% endif %}<|start|>assistant",
        {},
        "<|start|>assistant<|channel|>final<|message|>",
    ),
    "old thoughts are no switch": ("{% if preserve_thinking or clear_thinking %}!{% endif %}", {}, "[assistant]"),
}


@pytest.mark.parametrize("manner", MANNERS)
def test_no_prompt_ends_in_a_thought(manner: str) -> None:
    written, off, end = MANNERS[manner]
    tokenizer = characters(TURNS + ASK.replace("%s", written))
    assert in_use(tokenizer, {}) == off
    rendered = render(tokenizer, QUESTION, where="here", prefix=" It is")
    assert rendered.text.startswith("<s>[user]Where? <think>[assistant]")
    assert rendered.text.endswith(f"{end} It is")
    # All who render do so.
    generated = prompts.generate(tokenizer, prompts.tasks_for(tokenizer), length=4000, count=1, seed=0)[0]
    begun = rf"{re.escape(end)}The special magic number for \w+ mentioned in the provided text is$"
    assert re.search(begun, generated.text)
    asked = tokens_of(Context(tokenizer=tokenizer, chat=True), Asked("Where?", ("x",), prefix=" It is"))
    assert tokenizer.decode(asked).endswith(f"{end} It is")


@pytest.mark.parametrize(
    ("manner", "given", "end"),
    [
        ("open unless off", {"enable_thinking": True}, "</think>"),
        ("empty thought when off", {"enable_thinking": True}, "</think>"),
        ("budget", {"thinking_budget": 512}, "</seed:think>"),
        ("mode in words", {"thinking_mode": "enabled"}, "</mm:think>"),
        ("channels", {"reasoning_effort": "high"}, "<|channel|>final<|message|>"),
    ],
)
def test_thinking_is_there_for_those_who_ask(manner: str, given: dict[str, Any], end: str) -> None:
    """The thought comes first, and what ends it is known; an answer's beginning can't stand inside."""
    tokenizer = characters(TURNS + ASK.replace("%s", MANNERS[manner][0]))
    assert thought_end(tokenizer, given) == end
    assert thought_end(tokenizer, {}) is thought_end(tokenizer, MANNERS[manner][1]) is None
    thinking = render(tokenizer, QUESTION, where="here", arguments=given, answered=False).text
    assert not thinking.endswith(end)
    if manner != "empty thought when off":
        with pytest.raises(ValueError, match=r"the answer would stand inside a thought; leave thinking off"):
            render(tokenizer, QUESTION, where="here", arguments=given)


def test_a_template_that_refuses_to_be_switched_off() -> None:
    refuses = "{% if enable_thinking is defined and not enable_thinking %}{{ raise_exception('never') }}{% endif %}"
    tokenizer = characters(TURNS + ASK.replace("%s", f"{refuses}<think>\n"))
    assert render(tokenizer, QUESTION, where="here").text.endswith("[assistant]<think>\n\n</think>\n\n")


def test_what_is_switched_off_in_vain_is_closed() -> None:
    tokenizer = characters("{{ enable_thinking }}" + TURNS + ASK.replace("%s", "<think>\n"))
    for given in ({}, {"enable_thinking": False}):
        rendered = render(tokenizer, QUESTION, where="here", arguments=given)
        assert rendered.text.endswith("<think>\n\n</think>\n\n")
        assert thought_end(tokenizer, given) is None
    with pytest.raises(ValueError, match="stand inside a thought"):
        render(tokenizer, QUESTION, where="here", arguments={"enable_thinking": True})


def test_arguments_that_nothing_reads_are_refused() -> None:
    tokenizer = characters(TURNS + "{{ date }}{% generation %}{% endgeneration %}")
    check_arguments(tokenizer, {"date": "today"})
    assert "today" in render(tokenizer, QUESTION, where="here", arguments={"date": "today"}).text
    with pytest.raises(ValueError, match=r"--chat-template-kwargs: the chat template takes no 'dat'; it takes date$"):
        check_arguments(tokenizer, {"dat": 1})
    with pytest.raises(ValueError, match="takes no 'add_generation_prompt'"):
        check_arguments(characters(TURNS + ASK.replace("%s", "")), {"add_generation_prompt": True})
    with pytest.raises(ValueError, match="has no chat template"):
        check_arguments(characters(), {"date": 1})


def content_as_parts(*parts: Any) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(parts)}]


def test_contents_as_parts_are_texts() -> None:
    tokenizer = characters(TURNS)
    parts = content_as_parts({"type": "text", "text": "one"}, "two", {"type": "input_text", "text": "three"})
    assert render(tokenizer, parts, where="here").text == "<s>[user]one\ntwo\nthree"
    for part, says in (
        ({"type": "image_url", "image_url": {"url": "x"}}, "message 1 has a part of type 'image_url'"),
        ({"type": "input_audio"}, "message 1 has a part of type 'input_audio'"),
        ({"type": "text", "text": 3}, 'a part is {"type": "text", "text": 3}; write'),
        (7, "a part is 7; write"),
    ):
        with pytest.raises(ValueError, match="line 3: message 1") as refused:
            render(tokenizer, content_as_parts(part), where="line 3")
        assert says in str(refused.value)
        assert "\n" not in str(refused.value)
    with pytest.raises(ValueError, match='"content" is null; write a text'):
        render(tokenizer, [{"role": "user"}], where="here")
    with pytest.raises(ValueError, match="message 2: expected"):
        render(tokenizer, [*QUESTION, "hello"], where="here")


def test_a_template_that_wants_parts_gets_them() -> None:
    tokenizer = characters("{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endfor %}")
    assert render(tokenizer, QUESTION, where="here").text == QUESTION[0]["content"]


def test_a_text_that_the_template_leaves_out_is_missed() -> None:
    with pytest.raises(ValueError, match="here: the tokenizer's chat template leaves the text out"):
        render(characters("[{{ messages | length }}]"), QUESTION, where="here")
    # Written in another way, it is there.
    assert render(characters("{{ messages[0].content | upper }}"), SYSTEM[1:], where="here").text == "HELLO"


SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
STRICT = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('alternate') }}"
    "{% endif %}[{{ m.role }}]{{ m.content }}{% endfor %}"
)


@pytest.mark.parametrize(
    "template",
    [
        STRICT,
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}" + TURNS,
        # In silence.
        "{% for m in messages if m.role != 'system' %}[{{ m.role }}]{{ m.content }}{% endfor %}",
    ],
    ids=["alternates", "refuses", "drops"],
)
def test_a_system_text_has_a_place(template: str) -> None:
    rendered = render(characters(template), SYSTEM, where="here").text
    assert rendered.removeprefix("<s>") == "[user]Be brief.\n\nHello"


def test_turns_of_one_role_are_one_where_roles_must_alternate() -> None:
    twice = [*SYSTEM, {"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I."}, SYSTEM[1]]
    text = render(characters(STRICT), twice, where="here").text
    assert text == "[user]Be brief.\n\nHello\n\nWho?[assistant]I.[user]Hello"


def test_a_refusal_that_stays_is_told() -> None:
    with pytest.raises(ValueError, match=r"^line 4: the tokenizer's chat template refuses it: no tools$"):
        render(characters("{{ raise_exception('no tools') }}"), QUESTION, where="line 4")
    with pytest.raises(ValueError, match=r'has no chat template for "messages".*--tokenizer'):
        render(characters(), QUESTION, where="here")
    several = characters(TURNS)
    several.chat_template = {"default": TURNS, "tool_use": "{{ no }}"}
    assert render(several, QUESTION, where="here").text.endswith("<think>")


def test_a_mistral_tokenizer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """``tekken.json`` is all there is: no template, and control tokens that no text can say."""
    found = importlib.util.find_spec("mistral_common")
    if found is None or found.submodule_search_locations is None:
        pytest.skip("mistral_common comes with vLLM")
    data = Path(found.submodule_search_locations[0]) / "data"
    shutil.copy(data / "tekken_240911.json", tmp_path / "tekken.json")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mistral"}))
    tokenizer = load_tokenizer(str(tmp_path))
    assert has_template(tokenizer)
    text, tokens = render(tokenizer, SYSTEM, where="here", prefix=" It is")
    assert tokens is not None
    assert text.endswith("[/INST] It is")
    control = tokenizer.convert_tokens_to_ids(["[INST]", "[/INST]"])
    assert [token for token in tokens if token in control] == control
    assert tokens[0] == tokenizer.bos_token_id
    (prompt,) = prompts.generate(tokenizer, prompts.tasks_for(tokenizer), length=1500, count=1, seed=0)
    assert "[transformers]" not in capsys.readouterr().err
    assert [token for token in prompt.sample.prompt if token in control] == control
    assert 1400 < len(prompt.sample.prompt) <= 1500
    with pytest.raises(ValueError, match="refuses it"):
        render(tokenizer, [{"role": "poet", "content": "a"}], where="here")
