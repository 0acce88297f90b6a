"""Conversations as prompts, in the tokenizer's own chat template, up to where the answer begins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vllm_trimix.measurement import thoughts

# What rendering itself sets.
_RESERVED = frozenset({"messages", "add_generation_prompt", "continue_final_message", "tokenize", "chat_template"})
_SYSTEM = ("system", "developer")
_TEXT_PARTS = ("text", "input_text", "output_text")

Message = dict[str, Any]


class Rendered(NamedTuple):
    """A conversation as a prompt.

    Attributes:
        text: All of it.
        tokens: Its ids, where only the tokenizer itself can tell them; None: those of the text.
    """

    text: str
    tokens: list[int] | None = None


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer can say how a conversation looks."""
    return bool(getattr(tokenizer, "chat_template", None)) or _is_mistral(tokenizer)


def check_arguments(tokenizer: Any, arguments: Mapping[str, Any], *, flag: str = "--chat-template-kwargs") -> None:
    """Refuses arguments that nothing would read.

    Raises:
        ValueError: There is no template, or it doesn't know one of them.
    """
    if not arguments:
        return
    if not has_template(tokenizer):
        raise ValueError(f"{flag}: this tokenizer has no chat template that could take arguments; leave them out")
    known = _known(tokenizer)
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ValueError(
            f"{flag}: the chat template reads no {', '.join(map(repr, unknown))}; it reads "
            f"{', '.join(sorted(known)) or 'no argument'}"
        )


def in_use(tokenizer: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that conversations are rendered with: the user's, and else those that switch thinking off."""
    source = _source(tokenizer)
    return {**(thoughts.off(source) if source else {}), **arguments}


def thought_end(tokenizer: Any, arguments: Mapping[str, Any]) -> str | None:
    """What ends the thoughts that the user's arguments ask for; None where they ask for none."""
    source = _source(tokenizer)
    off = thoughts.off(source) if source else {}
    asked = {name for name in arguments if source and name in thoughts.switches(source)}
    if all(name in off and arguments[name] == off[name] for name in asked):
        return None
    turns = [{"role": "user", "content": "a"}]
    text = _text(tokenizer, turns, dict(arguments), "--chat-template-kwargs")
    thought = thoughts.open_thought(text, _tail(text, turns))
    if thought is not None:
        return thought.end.strip()
    # The model opens it: then it ends as an empty one does.
    kept = {name: value for name, value in arguments.items() if name not in asked}
    text = _text(tokenizer, turns, kept, "--chat-template-kwargs")
    return thoughts.last_end(_tail(text, turns))


def render(
    tokenizer: Any,
    messages: Sequence[Any],
    *,
    where: str,
    arguments: Mapping[str, Any] | None = None,
    prefix: str = "",
    answered: bool = True,
) -> Rendered:
    """A conversation in the tokenizer's chat template, up to where the answer begins.

    Thinking is off unless ``arguments`` say otherwise. A thought that the template opens anyway is closed, as an answer
    inside of it would be none.

    Args:
        tokenizer: Of transformers.
        messages: ``{"role": ..., "content": ...}`` each; contents may be lists of texts.
        where: The beginning of errors.
        arguments: Of the template, the user's.
        prefix: The answer's beginning.
        answered: Whether an answer is compared with a known one; otherwise it may begin with a thought.

    Raises:
        ValueError: There is no template, it refuses the conversation, or ``arguments`` open a thought.
    """
    given = dict(arguments or {})
    if not has_template(tokenizer):
        raise ValueError(
            f'{where}: this tokenizer has no chat template for "messages"; give the text as "prompt", or another '
            "tokenizer (--tokenizer)"
        )
    plain = [_plain(message, f"{where}: message {number}") for number, message in enumerate(messages, start=1)]
    if not plain:
        raise ValueError(f"{where}: the conversation has no message")
    if _is_mistral(tokenizer):
        return _mistral(tokenizer, plain, given, prefix, where)
    text = _text(tokenizer, plain, given, where)
    thought = thoughts.open_thought(text, _tail(text, plain))
    if thought is not None and given.keys() & thoughts.switches(_source(tokenizer)):
        if answered:
            raise ValueError(
                f"{where}: with {json.dumps(given)} the chat template ends in {thought.tag}: the answer would stand "
                "inside a thought; leave thinking off (--chat-template-kwargs)"
            )
    elif thought is not None:
        text += thought.end
    return Rendered(text + prefix)


def _text(tokenizer: Any, messages: list[Message], given: dict[str, Any], where: str) -> str:
    """The first way to put the conversation that the template takes and of which it leaves nothing out."""
    refusal: Exception | None = None
    partial: tuple[str, list[Message], dict[str, Any]] | None = None
    for variant in _variants(messages):
        for arguments in _arguments(tokenizer, given):
            try:
                text = _applied(tokenizer, variant, arguments)
            except Exception as error:
                refusal = refusal or error
                continue
            if _is_whole(text, variant):
                return text
            partial = partial or (text, variant, arguments)
            # Other arguments would leave it out as well.
            break
    if partial is None:
        raise ValueError(f"{where}: the tokenizer's chat template refuses it: {_first_line(refusal)}")
    text, variant, arguments = partial
    if _applied(tokenizer, [*variant[:-1], {**variant[-1], "content": "another text"}], arguments) == text:
        raise ValueError(f'{where}: the tokenizer\'s chat template leaves the text out; give it as "prompt"')
    # It writes the text in another way, but writes it.
    return text


def _applied(tokenizer: Any, messages: list[Message], arguments: dict[str, Any]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments))


def _is_whole(text: str, messages: list[Message]) -> bool:
    """Whether the system's texts and the last turn are in a prompt, as texts."""
    for message in [message for message in messages[:-1] if message["role"] in _SYSTEM] + messages[-1:]:
        content = message["content"]
        if isinstance(content, list):
            content = content[0]["text"]
            # A list that was written as Python writes it.
            if "{'type': 'text'" in text and "{'type': 'text'" not in content:
                return False
        if content.strip() not in text:
            return False
    return True


def _variants(messages: list[Message]) -> Iterator[list[Message]]:
    """As it is, with contents as parts, and without what some templates have no place for."""
    folded = _folded(messages)
    for variant in (messages, folded) if folded != messages else (messages,):
        yield variant
        yield [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in variant]


def _folded(messages: list[Message]) -> list[Message]:
    """System texts at the beginning of the user's first turn, and turns of the same role as one."""
    found: list[Message] = []
    for message in messages:
        role = "user" if message["role"] in _SYSTEM else message["role"]
        if found and found[-1]["role"] == role and role in ("user", "assistant"):
            found[-1] = {**found[-1], "content": f"{found[-1]['content']}\n\n{message['content']}"}
        else:
            found.append({**message, "role": role})
    return found


def _arguments(tokenizer: Any, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The user's arguments with those that switch thinking off, all, few or none of them: templates refuse some."""
    off = thoughts.off(_source(tokenizer))
    seen = []
    for chosen in (off, {name: value for name, value in off.items() if isinstance(value, bool)}, {}):
        arguments = {**chosen, **given}
        if arguments not in seen:
            seen.append(arguments)
            yield arguments


def _tail(text: str, messages: list[Message]) -> str:
    """What the template put behind the last message."""
    content = messages[-1]["content"].strip()
    place = text.rfind(content) if content else -1
    return text[place + len(content) :] if place >= 0 else text[-200:]


def _plain(message: Any, where: str) -> Message:
    """A message whose content is a text."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise ValueError(f'{where}: expected {{"role": ..., "content": ...}}, got {_short(message)}')
    content = message.get("content")
    # A turn that only calls tools has none.
    is_empty = content is None and message["role"] == "assistant"
    return {**message, "content": "" if is_empty else text_of(content, where)}


def text_of(content: Any, where: str) -> str:
    """A message's content as a text: as it is, or the texts of its parts, a line each.

    Raises:
        ValueError: There is something else in it.
    """
    if isinstance(content, list):
        content = "\n".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise ValueError(f'{where}: "content" is {_short(content)}; write a text, or a list of text parts')
    return content


def _part(part: Any, where: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        text = part.get("text")
        if part.get("type", "text") in _TEXT_PARTS and isinstance(text, str):
            return text
        if isinstance(part.get("type"), str) and part["type"] not in _TEXT_PARTS:
            raise ValueError(f"{where} has a part of type {part['type']!r}; prompts are texts here: leave it out")
    raise ValueError(f'{where}: a part is {_short(part)}; write {{"type": "text", "text": ...}}')


def _mistral(tokenizer: Any, messages: list[Message], given: dict[str, Any], prefix: str, where: str) -> Rendered:
    """By Mistral's own tokenizer, whose control tokens no text can say."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **given)
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **given)
    except Exception as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses it: {_first_line(error)}") from None
    more = tokenizer(prefix, add_special_tokens=False).input_ids if prefix else []
    return Rendered(text + prefix, [*tokens, *more])


def _is_mistral(tokenizer: Any) -> bool:
    """Whether it is mistral_common's, as for a model with ``tekken.json`` alone: it needs no template."""
    return any(kind.__name__ == "MistralCommonBackend" for kind in type(tokenizer).__mro__)


def _source(tokenizer: Any) -> str:
    """The template's text, empty where there is none."""
    if not getattr(tokenizer, "chat_template", None):
        return ""
    try:
        return str(tokenizer.get_chat_template())
    except ValueError:
        # Several, none of them the default: rendering says so.
        return ""


def _known(tokenizer: Any) -> frozenset[str]:
    if _is_mistral(tokenizer):
        return frozenset({"reasoning_effort"})
    return thoughts.variables(_source(tokenizer)) - _RESERVED


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=repr)
    return text if len(text) <= 80 else f"{text[:77]}..."
