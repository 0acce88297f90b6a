"""Prompts for the probe and the search: generated from a seed with the model's own tokenizer, or read from a file."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_trimix.demo.languages import detect, trained_keys
from vllm_trimix.measurement.chat_template import Rendered, has_template, render
from vllm_trimix.measurement.prompt_text import NoRoom, largest, token_ids
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import prompt_files
from vllm_trimix.probing.gradient import Sample
from vllm_trimix.probing.tasks import Question, Task, tasks_of
from vllm_trimix.untrusted import read_text as decoded


@dataclass(frozen=True)
class Prompt:
    """A prompt with its tokens.

    Attributes:
        kind: A task's name, ``file``, ``text`` or ``document``.
        text: As the model reads it, template included.
        answer: What it should say; empty where a file doesn't tell and needn't.
        sample: The same as tokens.
    """

    kind: str
    text: str
    answer: str
    sample: Sample


def tasks_for(tokenizer: Any) -> tuple[Task, ...]:
    """The tasks in the language that a model with this tokenizer speaks, from easy to hard."""
    return tasks_of(detect(tokenizer), keys=trained_keys(tokenizer))


def generate(
    tokenizer: Any,
    tasks: Sequence[Task],
    *,
    length: int,
    count: int,
    seed: int | str,
    flag: str = "--lengths",
    template_arguments: Mapping[str, Any] | None = None,
) -> list[Prompt]:
    """``count`` prompts of at most ``length`` tokens, of the tasks by turns.

    The asked-for item lies in the middle half of the text, so that its rows are neither sinks nor last rows.

    Raises:
        ValueError: The length, which ``flag`` sets, leaves no room.
    """
    return [
        _fit(tokenizer, task, random.Random(f"{seed} {index}"), length, flag, template_arguments)
        for index in range(count)
        for task in [tasks[index % len(tasks)]]
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
    task: Task,
    rng: random.Random,
    length: int,
    flag: str,
    arguments: Mapping[str, Any] | None,
) -> Prompt:
    """The largest text of its task within the length."""
    state = rng.getstate()

    def at(size: int) -> Prompt:
        rng.setstate(state)
        question = task.write(rng, size)
        return _encode(tokenizer, task.name, _asked(tokenizer, question, arguments), question.answer)

    if task.sized_by_tokens:
        try:
            return at(length)
        except ValueError as error:
            raise ValueError(f"{flag}: {length}: {error}") from None
    try:
        return at(largest(lambda size: len(at(size).sample.prompt), limit=length, low=task.least))
    except NoRoom as error:
        raise ValueError(f"{flag}: {length} tokens leave no room for a {task.name} prompt; {error}") from None


def _asked(tokenizer: Any, question: Question, arguments: Mapping[str, Any] | None) -> Rendered:
    """The text as a user's turn where the tokenizer has a chat template, with the beginning of the answer."""
    if not question.prefix:
        return Rendered(question.text)
    if has_template(tokenizer):
        turns = [{"role": "user", "content": question.text}]
        return render(tokenizer, turns, where="chat template", arguments=arguments, prefix=question.prefix)
    return Rendered(f"{question.text}\n{question.prefix}")


def _encode(tokenizer: Any, kind: str, prompt: Rendered, answer: str) -> Prompt:
    tokens = tuple(token_ids(tokenizer, prompt.text) if prompt.tokens is None else prompt.tokens)
    said = tuple(tokenizer(answer, add_special_tokens=False).input_ids)
    if answer and prompt.tokens is None:
        # As the two read together, where the answer begins a token.
        whole = tuple(token_ids(tokenizer, prompt.text + answer))
        said = whole[len(tokens) :] if whole[: len(tokens)] == tokens else said
    return Prompt(kind, prompt.text, answer, Sample(tokens, said))


def describe(prompts: list[Prompt]) -> Iterator[str]:
    """One line a kind: how many, of which lengths."""
    for kind in sorted({prompt.kind for prompt in prompts}):
        lengths = [len(prompt.sample.prompt) for prompt in prompts if prompt.kind == kind]
        yield f"{len(lengths)} {kind}, {min(lengths)}-{max(lengths)} tokens"
