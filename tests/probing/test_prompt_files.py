"""Files of prompts as people have them: encodings, layouts, published benchmarks' forms, and what is no prompt."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.evaluation.tokenizers import characters
from vllm_trimix.probing.prompt_files import Given, is_json, read
from vllm_trimix.probing.prompts import read as read_prompts
from vllm_trimix.probing.prompts import read_text

ROOT = Path(__file__).parents[2]
TWO = [{"prompt": "naïve → one", "answer": "x"}, {"prompt": "three", "answer": "y"}]
LINES = "".join(json.dumps(item, ensure_ascii=False) + "\n" for item in TWO)


def given(path: Path, content: str | bytes | Any, *, answers: bool = False) -> list[Given]:
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return read(path, answers=answers)


@pytest.mark.parametrize(
    "content",
    [
        LINES.encode(),
        LINES.rstrip().encode(),
        LINES.replace("\n", "\r\n").encode(),
        LINES.replace("\n", "\r").encode(),
        LINES.replace("\n", "\n \n\n").encode(),
        LINES.encode("utf-8-sig"),
        LINES.encode("utf-16"),
        b"\xfe\xff" + LINES.encode("utf-16-be"),
        LINES.encode("utf-32"),
        json.dumps(TWO).encode(),
        json.dumps(TWO, indent=1).encode("utf-8-sig"),
        ("\n\n" + json.dumps(TWO, indent=4, ensure_ascii=False)).encode(),
        "\n".join(json.dumps(item, indent=2) for item in TWO).encode(),
        json.dumps({"version": 1, "data": TWO}, indent=1).encode(),
    ],
    ids=[
        *("lines", "no last end", "crlf", "cr", "empty lines", "bom", "utf-16", "utf-16-be", "utf-32", "array"),
        *("indented array with bom", "indented array", "indented objects", "array inside"),
    ],
)
def test_every_layout_is_read(content: bytes, tmp_path: Path) -> None:
    found = given(tmp_path / "p.json", content, answers=True)
    assert [(item.text, item.answer) for item in found] == [(item["prompt"], item["answer"]) for item in TWO]


@pytest.mark.parametrize(
    "end", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1d", "\x1e", "\x00", "\r", "\n"]
)
def test_what_else_ends_lines_ends_none_here(end: str, tmp_path: Path) -> None:
    text = f"one{end}two"
    # JSON wants control characters escaped; of the others either way is right.
    ways = [json.dumps({"prompt": text}), *([json.dumps({"prompt": text}, ensure_ascii=False)] if end > " " else [])]
    found = given(tmp_path / "p.jsonl", "\n".join(ways))
    assert [item.text for item in found] == [text] * len(ways)


def test_the_locale_decides_nothing(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(LINES.encode())
    code = (
        "import sys, pathlib; from vllm_trimix.probing.prompt_files import read; "
        "print(len(read(pathlib.Path(sys.argv[1]), answers=True)[0].text))"
    )
    environment = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"{len('naïve → one')}\n"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"prompt": "a"}\n\n{"prompt": "b\xff"}\n', "line 3: byte 0xff is not UTF-8; write the file as UTF-8"),
        (b'\xef\xbb\xbf{"prompt": "b\xe9"}', "line 1: byte 0xe9 is not UTF-8"),
        ('{"prompt": "ä"}'.encode("utf-16-le"), "line 1: byte 0xe4 is not UTF-8; UTF-16 without its mark?"),
        (b"\xff\xfe{\x00\x00", "is not the UTF-16 that its first bytes promise"),
        (b"\x1f\x8b\x08\x00", "is a gzip file, no text; unpack or convert it first"),
        (b"PAR1\x15\x04", "is a Parquet file"),
        (b"", "holds no prompts"),
        (b" \n\n", "holds no prompts"),
        (b"[]", "holds no prompts"),
        (b'{"prompt": "a"}\n{"prompt": "b"', "line 2: not JSON: "),
        (b'[{"prompt": "a"},\n {"prompt": "b"},\n oops]', "line 3: not JSON: "),
        (b'{\n "prompt": "a",\n}', "line 3: not JSON: "),
        (b'{"prompt": "a"}\n"b"', "line 2: expected an object like"),
        (b'[{"prompt": "a"}, 7]', 'item 2: expected an object like {"prompt": ..., "answer": ...}, got 7'),
        (b"[" * 100_000, "is nested too deeply"),
        (b'{"prompt": "a\\ud83d"}', "line 1: holds half a character (\\ud83d)"),
        (b'{"prompt": " "}', "line 1: the prompt is empty"),
        (b'{"prompt": 3}', 'line 1: neither "prompt" (a text) nor "messages" (a list)'),
        (b'{"prompt": ["a", "b"]}', "found the fields 'prompt' (a list)"),
        (b'{"conversations": [{"from": "ghost", "value": "boo"}]}', "message 1 is from 'ghost'; known are human"),
        (b"{}", "found no field"),
        (b'{"question": "Where?", "context": {"pages": [1]}}', "'context' (an object)"),
        (
            json.dumps({"question": "Where?", "chapter": "It was. " * 100}).encode(),
            "'chapter', a text of 800 characters, would be left out of the prompt",
        ),
    ],
)
def test_what_is_wrong_is_told_with_file_and_line(content: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match=re.escape(says)) as refused:
        given(path, content)
    assert str(refused.value).startswith(f"--prompts: {path}")
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 800


CHAT = [{"role": "user", "content": "Where?"}]
# Name -> an object of the file, the prompt or the conversation, and the answer.
FORMS: dict[str, tuple[dict[str, Any], str | list[Any], str]] = {
    "ours": ({"prompt": "Where?", "answer": "here"}, "Where?", "here"),
    "ours, chat": ({"messages": CHAT, "answer": "here"}, CHAT, "here"),
    "ours, chat, no prompt": ({"prompt": "", "messages": CHAT, "answer": "here"}, CHAT, "here"),
    "no answer": ({"prompt": "Where?"}, "Where?", ""),
    "null answer": ({"prompt": "Where?", "answer": None}, "Where?", ""),
    "several answers": ({"prompt": "Where?", "answer": ["here", "there"]}, "Where?", "here"),
    "number": ({"prompt": "How many?", "answer": 7}, "How many?", "7"),
    "InfiniteBench": (
        {"id": 1, "context": "A book.", "input": "Where?", "answer": ["here", "there"], "options": []},
        "A book.\n\nWhere?",
        "here",
    ),
    "InfiniteBench, choices": (
        {"context": "A book.", "input": "Where?", "answer": ["there"], "options": ["here", "there"]},
        "A book.\n\nWhere?\n\nA. here\nB. there",
        "there",
    ),
    "RULER": ({"index": 0, "input": "A book. Where?", "outputs": ["here"], "length": 4096}, "A book. Where?", "here"),
    "RULER, prefix apart": (
        {"input": "A book. Where?", "answer_prefix": " It is", "outputs": ["here"]},
        "A book. Where? It is",
        "here",
    ),
    "LongBench": (
        {"input": "Where?", "context": "A book.", "answers": ["here"], "length": 9, "all_classes": None, "_id": "1"},
        "A book.\n\nWhere?",
        "here",
    ),
    "LongBench, no question": ({"input": "", "context": "A book.", "answers": ["It says."]}, "A book.", "It says."),
    "LongBench-v2": (
        {
            "_id": "1",
            "question": "Where?",
            "context": "A book.",
            "answer": "B",
            "choice_A": "here",
            "choice_B": "there",
            "choice_C": "up",
            "choice_D": "down",
        },
        "A book.\n\nWhere?\n\nA. here\nB. there\nC. up\nD. down",
        "B",
    ),
    "OpenAI batch": (
        {"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": CHAT}},
        CHAT,
        "",
    ),
    "OpenAI batch, completions": ({"custom_id": "1", "body": {"model": "m", "prompt": "Where?"}}, "Where?", ""),
    "OpenAI batch, responses": ({"custom_id": "1", "body": {"model": "m", "input": "Where?"}}, "Where?", ""),
    "OpenAI fine-tuning": (
        {"messages": [*CHAT, {"role": "assistant", "content": [{"type": "text", "text": "here"}]}]},
        CHAT,
        "here",
    ),
    "OpenAI evals": ({"input": CHAT, "ideal": "here"}, CHAT, "here"),
    "ShareGPT": (
        {
            "conversations": [
                {"from": "gpt", "value": "(cut off)"},
                {"from": "system", "value": "Be brief."},
                {"from": "human", "value": "Where?"},
                {"from": "gpt", "value": "here"},
            ]
        },
        [{"role": "system", "content": "Be brief."}, *CHAT],
        "here",
    ),
    "chat as prompt": ({"prompt": CHAT, "completion": "here"}, CHAT, "here"),
    "one of several questions": (
        {"context": "A book.", "questions": ["Where?"], "answer": ["here"]},
        "A book.\n\nWhere?",
        "here",
    ),
    "Alpaca": ({"instruction": "Say", "input": "where", "output": "here"}, "Say\n\nwhere", "here"),
    "SQuAD's answers": (
        {"context": "A book.", "question": "Where?", "answers": {"text": ["here"], "answer_start": [3]}},
        "A book.\n\nWhere?",
        "here",
    ),
    "Dolly": ({"instruction": "Where?", "context": "A book.", "response": "here"}, "Where?\n\nA book.", "here"),
    "HotpotQA": (
        {"question": "Where?", "context": [["Title", ["One. ", "Two."]], ["Other", ["Three."]]], "answer": "here"},
        "Title\nOne. \nTwo.\n\nOther\nThree.\n\nWhere?",
        "here",
    ),
    "documents": (
        {
            "question": "Where?",
            "ctxs": [{"title": "T", "text": "One.", "score": 1}, {"text": "Two."}],
            "answers": ["here"],
        },
        "T\nOne.\n\nTwo.\n\nWhere?",
        "here",
    ),
    "text and question": ({"text": "A book.", "question": "Where?"}, "A book.\n\nWhere?", ""),
    "context beside a prompt": ({"context": "A long book.", "prompt": "Where?"}, "A long book.\n\nWhere?", ""),
    "context in the prompt": ({"context": "A book.", "prompt": "A book. Where?"}, "A book. Where?", ""),
    "question": ({"question": "Where?", "answer": "here"}, "Where?", "here"),
    "text": ({"text": "A book.", "meta": {}}, "A book.", ""),
}


@pytest.mark.parametrize("form", FORMS)
def test_published_forms_are_read(form: str, tmp_path: Path) -> None:
    value, prompt, answer = FORMS[form]
    (found,) = given(tmp_path / "p.jsonl", value)
    assert (found.text if isinstance(prompt, str) else found.messages) == prompt
    assert found.answer == answer
    if answer:
        assert given(tmp_path / "p.jsonl", value, answers=True) == [found]
    else:
        with pytest.raises(ValueError, match=r'line 1: there is no answer: write it as "answer" \(a text\); found the'):
            given(tmp_path / "p.jsonl", value, answers=True)


def test_the_documented_lines_are_read(tmp_path: Path) -> None:
    (block,) = re.findall(r"```jsonl\n(.*?)```", (ROOT / "docs/prompts.md").read_text(encoding="utf-8"), re.DOTALL)
    first, second = given(tmp_path / "p.jsonl", block, answers=True)
    assert (first.text is None, second.messages is None) == (False, False)


def test_each_question_is_a_prompt(tmp_path: Path) -> None:
    shared = {"context": "A book.", "questions": ["Where?", "When?"], "answers": [["here", "h"], "now"]}
    found = given(tmp_path / "p.jsonl", shared, answers=True)
    assert [(item.text, item.answer) for item in found] == [("A book.\n\nWhere?", "here"), ("A book.\n\nWhen?", "now")]
    apart = {"document": "A book.", "questions": [{"question": "Where?", "answer": "here"}, {"question": "When?"}]}
    found = given(tmp_path / "p.jsonl", apart)
    assert [(item.text, item.answer) for item in found] == [("A book.\n\nWhere?", "here"), ("A book.\n\nWhen?", "")]


@pytest.mark.parametrize("layout", ["lines", "array", "object", "inside"])
def test_the_line_for_a_shell_converts_the_file(layout: str, tmp_path: Path) -> None:
    """Whatever its fields: the error has the line, the line makes prompts of them."""
    path = tmp_path / "it's odd.json"
    values = [
        {"nr": 1, "doc": f"A long book, number {n}", "q": "Where's it?", "gold answer": f"here {n}"} for n in "ab"
    ]
    content = {
        "lines": "".join(json.dumps(value) + "\n\n" for value in values),
        "array": json.dumps(values),
        "object": json.dumps(values[0], indent=1),
        "inside": json.dumps({"data": values}),
    }[layout]
    with pytest.raises(ValueError, match="'doc' \\(a text\\), 'q' \\(a text\\), 'gold answer' \\(a text\\)") as refused:
        given(path, content)
    line = str(refused.value).partition("this line makes such prompts: ")[2]
    subprocess.run(line.replace("python3", sys.executable, 1), shell=True, cwd=tmp_path, check=True)
    found = read(tmp_path / "prompts.jsonl", answers=True)
    expected = [(f"A long book, number {n}\n\nWhere's it?", f"here {n}") for n in "ab"]
    assert [(item.text, item.answer) for item in found] == expected[: 1 if layout == "object" else 2]


def test_conversations_go_through_the_template(tmp_path: Path) -> None:
    tokenizer = characters("{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<think>")
    path = tmp_path / "p.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}))
    assert read_prompts(path, tokenizer, answers=False)[0].text == "<user>hi<think></think>"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}))
    with pytest.raises(ValueError, match=r"p.jsonl, line 1: message 1 has a part of type 'image_url'"):
        read_prompts(path, tokenizer, answers=False)


def test_texts_and_objects_are_told_apart(tmp_path: Path) -> None:
    for name, content, expected in (
        ("a.jsonl", "", True),
        ("a.JSON", "", True),
        ("a.txt", '\ufeff {"prompt": "a"}', True),
        ("a.txt", '[\n {"prompt": "a"}]', True),
        ("a.txt", "{braces} open this novel", False),
        ("a.md", "[link](x)", False),
    ):
        path = tmp_path / name
        path.write_text(content, encoding="utf-8")
        assert is_json(path) is expected, content
    text = tmp_path / "a.txt"
    text.write_bytes("\ufeffnaïve".encode())
    assert read_text(text, characters(), lengths=[5], flag="--lengths")[0].text == "naïve"
    text.write_bytes(b"a\nb\xff")
    with pytest.raises(ValueError, match=r"--prompts: .*a.txt, line 2: byte 0xff is not UTF-8"):
        read_text(text, characters(), lengths=[1], flag="--lengths")
