"""Prompts for the probe and the search: generated from a seed with the model's own tokenizer, or read from a file."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_trimix.measurement.chat_template import Rendered, has_template, render
from vllm_trimix.measurement.prompt_text import NoRoom, draw_uuid, json_pairs, largest, token_ids
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import prompt_files
from vllm_trimix.probing.gradient import Sample
from vllm_trimix.untrusted import read_text as decoded

_KV_HEAD = "Extract the value corresponding to the specified key in the JSON object below.\n\n"
_KV_TAIL = '\n\nKey: "{key}"\nWhat is the value of this key? Give the value only.'
_NEEDLE = "One of the special magic numbers for {city} is: {number}."
_NEEDLE_TAIL = "\n\nWhat is the special magic number for {city} mentioned in the text above? Give the number only."
_FILLER = (
    "The grass is green and the sky is blue above the long road.",
    "A train leaves the station every morning at the same quiet hour.",
    "Here we go, there and back again, as the river follows the valley.",
    "The baker opens the shop before the first light reaches the square.",
    "Nobody remembers who painted the gate by the old garden wall.",
    "In the evening the boats return and the harbour fills with voices.",
)
_CITIES = (
    "Lisbon", "Oslo", "Nairobi", "Kyoto", "Quito", "Perth", "Tunis", "Riga", "Lima", "Hanoi", "Bergen", "Cork",
    "Dakar", "Turin", "Malmo", "Kazan", "Leeds", "Busan", "Accra", "Porto",
)  # fmt: skip
_NUM_NEEDLES = 8


@dataclass(frozen=True)
class Prompt:
    """A prompt with its tokens.

    Attributes:
        kind: ``kv_retrieval``, ``multi_needle``, ``file`` or ``text``.
        text: As the model reads it, template included.
        answer: What it should say; empty where a file doesn't tell and needn't.
        sample: The same as tokens.
    """

    kind: str
    text: str
    answer: str
    sample: Sample


def generate(
    tokenizer: Any,
    *,
    length: int,
    count: int,
    seed: int,
    kinds: Sequence[str] = ("kv_retrieval", "multi_needle"),
    flag: str = "--length",
    template_arguments: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """``count`` prompts of at most ``length`` tokens, of the kinds by turns.

    The asked-for pair or needle lies in the middle half of the text, so that its rows are neither sinks nor last rows.

    Raises:
        ValueError: The length, which ``flag`` sets, leaves no room.
    """
    makers: dict[str, Callable[[random.Random, int], tuple[str, str]]] = {
        "kv_retrieval": kv_retrieval,
        "multi_needle": multi_needle,
    }
    return [
        _fit(tokenizer, kind, makers[kind], random.Random(f"{seed} {index}"), length, flag, template_arguments)
        for index in range(count)
        for kind in [kinds[index % len(kinds)]]
    ]


def read(
    path: Path,
    tokenizer: Any,
    *,
    answers: bool | None = True,
    template_arguments: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """Prompts from a file, of our own form (``{"prompt": TEXT or "messages": [...], "answer": TEXT}``) or a known one.

    Args:
        path: JSON lines or an array; see ``prompt_files``.
        tokenizer: The model's.
        answers: Whether every prompt needs an answer; None: answers are left out, and may begin with a thought.
        template_arguments: The user's, of the chat template.

    Raises:
        ValueError: What isn't such a prompt, with file and line.
        OSError: The file can't be read.
    """
    prompts = []
    for given in prompt_files.read(path, answers=bool(answers)):
        answer = "" if answers is None else given.answer
        if given.text is not None:
            prompts.append(_encode(tokenizer, "file", Rendered(given.text), answer))
            continue
        assert given.messages is not None
        rendered = render(
            tokenizer,
            given.messages,
            where=given.where,
            arguments=template_arguments,
            answered=bool(answer),
        )
        prompts.append(_encode(tokenizer, "file", rendered, answer))
    return prompts


def read_text(path: Path, tokenizer: Any, *, lengths: Sequence[int], flag: str) -> list[Prompt]:
    """A text file's first tokens, a prompt for each length, without answers.

    Raises:
        ValueError: No text, or one that is shorter than a length, which ``flag`` sets.
        OSError: The file can't be read.
    """
    text = decoded(path, f"--prompts: {path}")
    tokens = tuple(tokenizer(text, verbose=False).input_ids)
    if len(tokens) < max(lengths):
        raise ValueError(f"{flag}: {max(lengths)} tokens: {path} has {len(tokens)}; take shorter ones or a longer text")
    return [Prompt("text", text, "", Sample(tokens[:length], ())) for length in lengths]


def check_lengths(prompts: list[Prompt], pattern: Triangle, *, max_length: int | None) -> None:
    """Refuses prompts on which the triangle hides nothing, and those that the model can't take.

    Raises:
        ValueError: Naming the prompt, its length and the limit.
    """
    for index, prompt in enumerate(prompts, start=1):
        length = len(prompt.sample.prompt)
        if pattern.is_dense(length):
            raise ValueError(
                f"prompt {index} has {length} tokens: the triangle hides nothing up to {pattern.dense_len} "
                f"(n_init {pattern.n_init} + n_local {pattern.n_local} + last_n {pattern.last_n}); take longer prompts"
            )
    check_max_length(prompts, max_length)


def check_max_length(prompts: list[Prompt], max_length: int | None) -> None:
    """Refuses prompts that the model can't take.

    Raises:
        ValueError: Naming the prompt, its length and the limit.
    """
    for index, prompt in enumerate(prompts, start=1):
        length = len(prompt.sample.prompt)
        if max_length is not None and length + len(prompt.sample.answer) > max_length:
            raise ValueError(f"prompt {index} has {length} tokens: the model takes {max_length}; take shorter prompts")


def _fit(
    tokenizer: Any,
    kind: str,
    make: Callable[[random.Random, int], tuple[str, str]],
    rng: random.Random,
    length: int,
    flag: str,
    arguments: Mapping[str, Any] | None,
) -> Prompt:
    """The largest text of its kind within the length; its seed's content grows with its size."""
    state = rng.getstate()

    def at(size: int) -> Prompt:
        rng.setstate(state)
        text, answer = make(rng, size)
        return _encode(tokenizer, kind, _asked(tokenizer, text, arguments), answer)

    try:
        return at(largest(lambda size: len(at(size).sample.prompt), limit=length, low=_NUM_NEEDLES))
    except NoRoom as error:
        raise ValueError(f"{flag}: {length} tokens leave no room for a {kind} prompt; {error}") from None


def kv_retrieval(rng: random.Random, size: int) -> tuple[str, str]:
    """A JSON object of ``size`` pairs and a question for one of them, with the answer."""
    pairs = [(draw_uuid(rng), draw_uuid(rng)) for _ in range(size)]
    key, value = pairs[rng.randrange(size // 4, size - size // 4)]
    return _KV_HEAD + json_pairs(pairs) + _KV_TAIL.format(key=key), value


def multi_needle(rng: random.Random, size: int) -> tuple[str, str]:
    """``size`` filler sentences with eight needles and a question for one of them, with the answer."""
    sentences = [rng.choice(_FILLER) for _ in range(size)]
    cities = rng.sample(_CITIES, _NUM_NEEDLES)
    numbers = [str(number) for number in rng.sample(range(1_000_000, 10_000_000), _NUM_NEEDLES)]
    places = sorted(rng.sample(range(size), _NUM_NEEDLES), reverse=True)
    # The asked-for needle is the middle one.
    for place, city, number in zip(places, cities, numbers, strict=True):
        sentences.insert(place, _NEEDLE.format(city=city, number=number))
    asked = _NUM_NEEDLES // 2
    return " ".join(sentences) + _NEEDLE_TAIL.format(city=cities[asked]), numbers[asked]


def _asked(tokenizer: Any, text: str, arguments: Mapping[str, Any] | None) -> Rendered:
    """The text as a user's turn where the tokenizer has a chat template, with the start of the answer."""
    if has_template(tokenizer):
        return render(tokenizer, [{"role": "user", "content": text}], where="chat template", arguments=arguments)
    return Rendered(text + "\nAnswer: ")


def _encode(tokenizer: Any, kind: str, prompt: Rendered, answer: str) -> Prompt:
    tokens = token_ids(tokenizer, prompt.text) if prompt.tokens is None else prompt.tokens
    answer_tokens = tokenizer(answer, add_special_tokens=False).input_ids
    return Prompt(kind, prompt.text, answer, Sample(tuple(tokens), tuple(answer_tokens)))


def describe(prompts: list[Prompt]) -> Iterator[str]:
    """One line a kind: how many, of which lengths."""
    for kind in sorted({prompt.kind for prompt in prompts}):
        lengths = [len(prompt.sample.prompt) for prompt in prompts if prompt.kind == kind]
        yield f"{len(lengths)} {kind}, {min(lengths)}-{max(lengths)} tokens"
