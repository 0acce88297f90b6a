"""What an object of a file of prompts asks: in our own form, or in that of a published benchmark."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from vllm_trimix.measurement.messages import text_of
from vllm_trimix.untrusted import quoted

_TURNS = ("messages", "conversations", "conversation", "prompt", "input")
CONTEXTS = (
    *("context", "contexts", "passage", "passages", "document", "documents", "article", "story", "ctxs"),
    *("paragraphs", "text", "content"),
)
_QUESTIONS = ("input", "question", "query", "questions")
_ANSWERS = (
    *("answer", "answers", "outputs", "output", "completion", "response", "target", "targets", "ideal", "reference"),
    *("references", "expected", "expected_answer", "gold", "label"),
)
_LIKE_ANSWERS = re.compile("answer|gold|label|target|solution|response|reply|result", re.IGNORECASE)
# ShareGPT's names, and others'.
_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("tool", "function", "observation", "function_call"), "tool"),
}
# A field of so many characters may be anything.
_SHORT = 200
_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


class Given(NamedTuple):
    """A prompt as a file gives it.

    Attributes:
        where: Flag, file and line, for errors.
        text: The prompt, or None where it is a conversation.
        messages: The conversation, or None.
        answer: What it should say; empty where the file doesn't tell.
    """

    where: str
    text: str | None
    messages: list[Any] | None
    answer: str


class Entry(NamedTuple):
    """An object of the file.

    Attributes:
        where: Flag, file and line.
        value: Parsed.
        source: How Python reads all of them from ``{file}``.
    """

    where: str
    value: Any
    source: str


def prompts_of(entry: Entry, path: Path) -> Iterator[Given]:
    """The prompts of an object: one, or one for each of its questions.

    Args:
        entry: The object.
        path: Its file.

    Raises:
        ValueError: It is no prompt, with the fields found, and a line that makes some of them.
    """
    value, where = entry.value, entry.where
    if not isinstance(value, dict):
        raise ValueError(f'{where}: expected an object like {{"prompt": ..., "answer": ...}}, got {quoted(value)}')
    # A request of OpenAI's batch files.
    body = value["body"] if isinstance(value.get("body"), dict) else value
    answer = _answer({**body, **value})
    turns = next((body[name] for name in _TURNS if _is_turns(body.get(name))), None)
    prompt = body.get("prompt")
    if isinstance(prompt, str) and (prompt.strip() or turns is None):
        context = _context(body) or ""
        # The long text that a short question is about.
        apart = len(context) > len(prompt) and context not in prompt
        yield _text(where, _joined(context, prompt) if apart else prompt, answer)
    elif turns is not None:
        yield _conversation(where, turns, answer)
    elif _is_turns(body.get("questions")):
        for item in body["questions"]:
            (text, *_) = _parts({**body, **item, "questions": None}) or [""]
            yield _text(where, text, _answer(item))
    elif texts := _parts(body):
        for question, text in enumerate(texts):
            _check_left_out(entry, body, text)
            yield _text(where, text, answer if len(texts) == 1 else _answer(value, question))
    else:
        raise ValueError(
            f'{where}: neither "prompt" (a text) nor "messages" (a list), nor a form that is known; found '
            f"{fields(value)}{_conversion(entry, path)}"
        )


def _parts(body: dict[str, Any]) -> list[str]:
    """Prompts put together from context, question and choices; none where these aren't there."""
    context = _context(body)
    if isinstance(body.get("instruction"), str):
        # Alpaca's and Dolly's.
        return [_joined(body["instruction"], body.get("input") or context)]
    asked = next((body[name] for name in _QUESTIONS if body.get(name)), None)
    questions = asked if isinstance(asked, list) else [asked]
    if context is None or (asked is not None and not all(isinstance(question, str) for question in questions)):
        return []
    if asked is None:
        return [context] if context else []
    # RULER's files have the answer's beginning apart.
    prefix = body.get("answer_prefix") if isinstance(body.get("answer_prefix"), str) else ""
    return [_joined(context, question, _choices(body)) + (prefix or "") for question in questions]


def _context(body: dict[str, Any]) -> str | None:
    """The text that is asked about, empty where there is none; None where it is in no form that is known."""
    return _flat(next((body[name] for name in CONTEXTS if body.get(name)), ""))


def _flat(value: Any, between: str = "\n\n") -> str | None:
    """Texts as one: a list of them, of titles with their sentences, or of objects with a title and a text."""
    if isinstance(value, dict):
        text = next(
            (value[name] for name in ("text", "content", "contents", "paragraph_text") if value.get(name)), None
        )
        return None if text is None else _flat([value.get("title") or "", text], "\n")
    if isinstance(value, list):
        texts = [_flat(item, "\n") for item in value]
        return None if None in texts else between.join(filter(None, texts))
    return value if isinstance(value, str) else None


def _check_left_out(entry: Entry, body: dict[str, Any], prompt: str) -> None:
    """Refuses to leave the long text out in silence: it may stand in a field that nobody reads.

    Raises:
        ValueError: Naming the field.
    """
    for name, item in body.items():
        if (
            isinstance(item, str)
            and name not in _ANSWERS
            and len(item) > max(_SHORT, len(prompt))
            and item not in prompt
        ):
            raise ValueError(
                f"{entry.where}: {quoted(name)}, a text of {len(item)} characters, would be left out of the prompt; "
                f'write all of it as "prompt"; found {fields(entry.value)}'
            )


def _choices(body: dict[str, Any]) -> str:
    """Choices, a line each: ``choice_A`` and so on, or a list."""
    lettered = [body.get(f"choice_{letter}") for letter in _LETTERS]
    listed = body.get("options") or body.get("choices") or []
    texts = lettered if lettered[0] is not None else listed if isinstance(listed, list) else []
    return "\n".join(
        f"{letter}. {text}"
        for letter, text in zip(_LETTERS, texts, strict=False)
        if isinstance(text, (str, int, float))
    )


def _joined(*texts: Any) -> str:
    return "\n\n".join(str(text) for text in texts if text)


def _is_turns(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(turn, dict) for turn in value)


def _text(where: str, text: str, answer: str) -> Given:
    if not text.strip():
        raise ValueError(f"{where}: the prompt is empty")
    return Given(where, text, None, answer)


def _conversation(where: str, turns: Sequence[dict[str, Any]], answer: str) -> Given:
    """A conversation up to its last answer, which is the answer where none is given."""
    messages = []
    for number, turn in enumerate(turns, start=1):
        if "from" in turn and "role" not in turn:
            role = _ROLES.get(str(turn["from"]).lower())
            if role is None:
                raise ValueError(
                    f"{where}: message {number} is from {quoted(turn['from'])}; known are {', '.join(_ROLES)}"
                )
            turn = {"role": role, "content": turn.get("value", turn.get("content"))}
        messages.append(turn)
    if len(messages) > 1 and messages[-1].get("role") == "assistant":
        last = messages.pop()
        answer = answer or text_of(last.get("content"), f"{where}: message {len(messages) + 1}")
    # The answer to a question that was cut off.
    while len(messages) > 1 and messages[0].get("role") == "assistant":
        messages.pop(0)
    return Given(where, None, messages, answer)


def _answer(value: dict[str, Any], question: int | None = None) -> str:
    """The first answer that is a text, of a question where there are several; empty where there is none."""
    for name in _ANSWERS:
        said = value.get(name)
        if question is not None and isinstance(said, list):
            said = said[question] if question < len(said) else None
        if found := _said(said):
            return found
    return ""


def _said(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, list):
        return next((found for item in value if (found := _said(item))), "")
    # SQuAD's.
    return _said(value.get("text")) if isinstance(value, dict) else ""


def fields(value: dict[str, Any]) -> str:
    """An object's fields, for errors."""
    names = [f"{quoted(name)} ({_kind(item)})" for name, item in list(value.items())[:20]]
    return f"the fields {', '.join(names)}" if names else "no field"


def _kind(value: Any) -> str:
    kinds = {str: "a text", list: "a list", dict: "an object", type(None): "null", bool: "true or false"}
    return kinds.get(type(value), "a number")


def _conversion(entry: Entry, path: Path) -> str:
    """A line for a shell that makes prompts of the longest texts, in the user's hands to change."""
    texts = {name: item for name, item in entry.value.items() if isinstance(item, str) and item.strip()}
    if not texts:
        return ""
    answers = [name for name in texts if _LIKE_ANSWERS.search(name)][:1]
    asked = sorted((name for name in texts if name not in answers), key=lambda name: -len(texts[name]))[:2]
    prompt = ' + "\\n\\n" + '.join(f"d[{json.dumps(name)}]" for name in asked or answers)
    answer = f', "answer": d[{json.dumps(answers[0])}]' if answers and asked else ""
    source = entry.source.replace("{file}", f"open({json.dumps(str(path))}, encoding='utf-8-sig')")
    code = f'import json; [print(json.dumps({{"prompt": {prompt}{answer}}})) for d in {source}]'
    return f"; this line makes such prompts: python3 -c {shlex.quote(code)} > prompts.jsonl"
