"""Thinking models: which arguments of a chat template switch thinking off, and thoughts that a prompt leaves open.

Both are read from the template and from the prompt, never from a model's name.
"""

from __future__ import annotations

import functools
import re
from typing import Any, NamedTuple

_VERB = r"(?:(?:enable|use|with|do|is|add|allow)_)?"
_SWITCH = re.compile(
    rf"{_VERB}(?:think|thinking|thoughts?|reason|reasoning|cot)(?:_(?P<kind>enabled|mode|type|budget|effort|level))?"
)
_OFF_SWITCH = re.compile(r"(?:no|disable|skip|without)_?(?:think|thinking|thoughts?|reason|reasoning|cot)")
# How templates spell it; where none of the first is known, the least effort is.
_OFF_WORDS = (
    *("none", "off", "disabled", "disable", "no_think", "no-think", "nothink", "no_thinking", "non-thinking", "chat"),
    *("minimal", "low"),
)
# <think>, [THINK], <seed:think>, <|START_THINKING|>, <|begin_of_thought|> and their ends.
_TAG = re.compile(
    r"(?P<left>[<\[\u25c1]\|?)(?P<slash>/?)(?P<name>[\w:.-]*(?:think|thought|reason|cot)[\w:.-]*)(?P<right>\|?[>\]\u25b7])",
    re.IGNORECASE,
)
_END = re.compile(r"(?<![A-Za-z])end(?![A-Za-z])", re.IGNORECASE)
_BEGINNINGS = (("START", "END"), ("BEGIN", "END"), ("start", "end"), ("begin", "end"))
# gpt-oss says in which channel it goes on: a thought, unless the answer's is named.
_CHANNELS = ("<|start|>assistant", "<|channel|>final<|message|>")


class Thought(NamedTuple):
    """A thought that a prompt leaves open.

    Attributes:
        tag: What opened it.
        end: What closes it, behind the prompt.
    """

    tag: str
    end: str


@functools.lru_cache(maxsize=16)
def variables(template: str) -> frozenset[str]:
    """What a chat template takes from outside."""
    # Comes with what renders templates.
    from jinja2 import meta

    return frozenset(meta.find_undeclared_variables(_parsed(template)))


@functools.lru_cache(maxsize=16)
def switches(template: str) -> frozenset[str]:
    """Those of its variables that are about thinking."""
    return frozenset(name for name in variables(template) if _SWITCH.fullmatch(name) or _OFF_SWITCH.fullmatch(name))


@functools.lru_cache(maxsize=16)
def _off(template: str) -> tuple[tuple[str, Any], ...]:
    # Comes with what renders templates.
    from jinja2 import nodes

    tree = _parsed(template)
    words = {str(node.value) for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    compared = {
        const.value
        for comparison in tree.find_all(nodes.Compare)
        if isinstance(comparison.expr, nodes.Name) and comparison.expr.name in switches(template)
        for const in comparison.find_all(nodes.Const)
        if isinstance(const.value, str)
    }
    found: list[tuple[str, Any]] = []
    for name in sorted(switches(template)):
        match = _SWITCH.fullmatch(name)
        if match is None:
            found.append((name, True))
        elif match["kind"] == "budget":
            found.append((name, 0))
        elif match["kind"] in ("mode", "type", "effort", "level"):
            known = [word for word in _OFF_WORDS if word in (compared & set(_OFF_WORDS) or words)]
            found += [(name, known[0])] if known else []
        else:
            found.append((name, False))
    return tuple(found)


def off(template: str) -> dict[str, Any]:
    """Arguments that switch thinking off, as far as the template knows any."""
    return dict(_off(template))


def open_thought(prompt: str, tail: str) -> Thought | None:
    """The thought in which a prompt ends.

    Args:
        prompt: All of it.
        tail: What the template put behind the last message: a user may write such tags too.
    """
    if prompt.endswith(_CHANNELS[0]):
        return Thought(_CHANNELS[0], _CHANNELS[1])
    opened: list[re.Match[str]] = []
    for tag in _TAG.finditer(tail):
        if tag["slash"] or _END.search(tag["name"]):
            opened = [before for before in opened if _end_name(before["name"]) != _end_name(tag["name"])]
        else:
            opened.append(tag)
    if not opened:
        return None
    last = opened[-1]
    name = _end_name(last["name"])
    slash = "/" if name == last["name"] else ""
    end = f"{last['left']}{slash}{name}{last['right']}"
    # Templates that have an empty thought on lines of its own close it so.
    return Thought(last[0], end if tail.endswith(last[0]) else f"\n{end}\n\n")


def last_end(tail: str) -> str | None:
    """The last end of a thought, as a template writes empty ones."""
    ends = [tag[0] for tag in _TAG.finditer(tail) if tag["slash"] or _END.search(tag["name"])]
    return ends[-1] if ends else None


def _end_name(name: str) -> str:
    """The name of a tag's end: the same but for a slash, or the other word."""
    for begin, end in _BEGINNINGS:
        if re.search(rf"(?<![A-Za-z]){begin}(?![A-Za-z])", name):
            return name.replace(begin, end)
    return name


def _parsed(template: str) -> Any:
    # Comes with what renders templates.
    from jinja2 import Environment

    # A tag of transformers' own, which changes no text.
    plain = re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", template)
    return Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
