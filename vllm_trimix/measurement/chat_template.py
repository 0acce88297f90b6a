"""Conversations as prompts, in the tokenizer's own chat template, up to where the answer begins."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from vllm_trimix.measurement import thoughts
from vllm_trimix.measurement.messages import SYSTEM, Message, as_texts, variants

# What rendering itself sets, the tokenizer's special tokens, and functions.
_RESERVED = frozenset(
    "messages add_generation_prompt continue_final_message tokenize chat_template bos_token eos_token unk_token "
    "pad_token sep_token cls_token mask_token raise_exception strftime_now".split()
)
# Stands for a text whose place is looked for; the longest that templates write behind it, in characters.
_MARK = "7302651948"
_LONGEST_TAIL = 1000


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
            f"{flag}: the chat template takes no {', '.join(map(repr, unknown))}; it takes "
            f"{', '.join(sorted(known)) or 'no argument'}"
        )


def in_use(tokenizer: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments that conversations are rendered with: the user's, and else those that switch thinking off."""
    source = _source(tokenizer)
    return {**(thoughts.off(source) if source else {}), **arguments}


def thought_end(tokenizer: Any, arguments: Mapping[str, Any]) -> str | None:
    """What ends the thoughts that the user's arguments ask for; None where they ask for none."""
    asked = _asking(tokenizer, arguments)
    if not asked:
        return None
    turns = [{"role": "user", "content": "a"}]
    applied = _apply(tokenizer, turns, dict(arguments), "--chat-template-kwargs")
    thought = thoughts.open_thought(applied.text, _tail(tokenizer, applied))
    if thought is not None:
        return thought.end.strip()
    # The model opens it: then it ends as an empty one does.
    kept = {name: value for name, value in arguments.items() if name not in asked}
    return thoughts.last_end(_tail(tokenizer, _apply(tokenizer, turns, kept, "--chat-template-kwargs")))


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
    plain = as_texts(messages, where)
    if _is_mistral(tokenizer):
        return _mistral(tokenizer, plain, given, prefix, where)
    applied = _apply(tokenizer, plain, given, where)
    text, thought = applied.text, thoughts.open_thought(applied.text, applied.text[-_LONGEST_TAIL:])
    if thought is not None:
        # It may be in what the user wrote.
        thought = thoughts.open_thought(text, _tail(tokenizer, applied))
    if thought is not None and _asking(tokenizer, given):
        if answered:
            raise ValueError(
                f"{where}: with {json.dumps(given)} the chat template ends in {thought.tag}: the answer would stand "
                "inside a thought; leave thinking off (--chat-template-kwargs)"
            )
    elif thought is not None:
        text += thought.end
    return Rendered(text + prefix)


class _Applied(NamedTuple):
    """A prompt, and the conversation and the arguments that made it."""

    text: str
    messages: list[Message]
    arguments: dict[str, Any]


def _apply(tokenizer: Any, messages: list[Message], given: dict[str, Any], where: str) -> _Applied:
    """The first way to put the conversation that the template takes and of which it leaves nothing out."""
    refusal: Exception | None = None
    partial: _Applied | None = None
    for variant in variants(messages):
        for arguments in _arguments(tokenizer, given):
            try:
                text = _rendered(tokenizer, variant, arguments)
            except Exception as error:
                refusal = refusal or error
                continue
            if _is_whole(text, variant):
                return _Applied(text, variant, arguments)
            partial = partial or _Applied(text, variant, arguments)
            # Other arguments would leave it out as well.
            break
    if partial is None:
        raise ValueError(f"{where}: the tokenizer's chat template refuses it: {_first_line(refusal)}")
    if _with_mark(tokenizer, partial) == partial.text:
        raise ValueError(f'{where}: the tokenizer\'s chat template leaves the text out; give it as "prompt"')
    # It writes the text in another way, but writes it.
    return partial


def _rendered(tokenizer: Any, messages: list[Message], arguments: dict[str, Any]) -> str:
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **arguments))


def _is_whole(text: str, messages: list[Message]) -> bool:
    """Whether the system's texts and the last turn are in a prompt, as texts."""
    for message in [message for message in messages[:-1] if message["role"] in SYSTEM] + messages[-1:]:
        content = message["content"]
        if isinstance(content, list):
            content = content[0]["text"]
            # A list that was written as Python writes it.
            if "{'type': 'text'" in text and "{'type': 'text'" not in content:
                return False
        if content.strip() not in text:
            return False
    return True


def _arguments(tokenizer: Any, given: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The user's arguments with those that switch thinking off, all, few or none of them: templates refuse some."""
    off = thoughts.off(_source(tokenizer))
    seen = []
    for chosen in (off, {name: value for name, value in off.items() if isinstance(value, bool)}, {}):
        arguments = {**chosen, **given}
        if arguments not in seen:
            seen.append(arguments)
            yield arguments


def _with_mark(tokenizer: Any, applied: _Applied) -> str:
    """The same prompt with a mark in place of the last message's text."""
    last = applied.messages[-1]
    mark = _MARK if isinstance(last["content"], str) else [{"type": "text", "text": _MARK}]
    return _rendered(tokenizer, [*applied.messages[:-1], {**last, "content": mark}], applied.arguments)


def _tail(tokenizer: Any, applied: _Applied) -> str:
    """What the template put behind the last message."""
    return _with_mark(tokenizer, applied).rpartition(_MARK)[2]


def _mistral(tokenizer: Any, messages: list[Message], given: dict[str, Any], prefix: str, where: str) -> Rendered:
    """By Mistral's own tokenizer, whose control tokens no text can say."""
    try:
        tokens = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False, **given)
    except Exception as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses it: {_first_line(error)}") from None
    more = tokenizer(prefix, add_special_tokens=False).input_ids if prefix else []
    # For people to read: asked for the text itself, it warns each time.
    return Rendered(str(tokenizer.decode(tokens)) + prefix, [*tokens, *more])


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


def _asking(tokenizer: Any, given: Mapping[str, Any]) -> set[str]:
    """Those of the user's arguments that let the model think."""
    source = _source(tokenizer)
    if not source:
        return set()
    off = thoughts.off(source)
    return {
        name for name in given if name in thoughts.switches(source) and (name not in off or given[name] != off[name])
    }


def _known(tokenizer: Any) -> frozenset[str]:
    if _is_mistral(tokenizer):
        return frozenset({"reasoning_effort"})
    return thoughts.variables(_source(tokenizer)) - _RESERVED


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
