"""From texts to samples: tokens, chat templates, and texts of a unit that fill the length."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from vllm_trimix.evaluation.sample import Sample
from vllm_trimix.evaluation.suite import Context
from vllm_trimix.measurement.chat_template import has_template, render
from vllm_trimix.measurement.prompt_text import NoRoom, largest, token_ids


@dataclass(frozen=True)
class Asked:
    """A question about a text.

    Attributes:
        text: The task and its text; a user's turn where that is asked for.
        references: Right answers.
        prefix: The answer's beginning, which the model goes on from.
        delimiter: Between the two where there are no turns, unless one of them brings white space.
    """

    text: str
    references: tuple[str, ...]
    prefix: str = ""
    delimiter: str = " "


Write = Callable[[str, int, float | None], Asked]
"""The text of a seed, of a size and with the answer at a depth: the same seed's grows by units with its size."""


def tokens_of(context: Context, asked: Asked) -> tuple[int, ...]:
    """The prompt.

    Raises:
        ValueError: Turns are asked for and the tokenizer has no chat template.
    """
    if context.chat:
        if not has_template(context.tokenizer):
            raise ValueError(
                "--chat-template: the model's tokenizer has no chat template; leave the option out for a base model"
            )
        turns = [{"role": "user", "content": asked.text}]
        text, tokens = render(
            context.tokenizer,
            turns,
            where="--chat-template",
            arguments=context.template_arguments,
            prefix="" if context.thought_end else asked.prefix,
            answered=not context.thought_end,
        )
        if tokens is not None:
            return tuple(tokens)
    else:
        joined = not asked.prefix or asked.text[-1:].isspace() or asked.prefix[0].isspace()
        text = asked.text + ("" if joined else asked.delimiter) + asked.prefix
    return tuple(token_ids(context.tokenizer, text))


def named(
    context: Context, task: str, length: int, count: int, depths: tuple[float, ...] = ()
) -> Iterator[tuple[float | None, int, str]]:
    """Depth, index and seed of each sample: nothing else names it, so others may come and go."""
    made = 0
    for depth in depths or (None,):
        for index in range(count):
            place = "" if depth is None else f" {depth:g}"
            yield depth, index, f"{context.seed} {task} {length}{place} {index}"
            made += 1
            context.made(made)


def fill(
    context: Context,
    task: str,
    length: int,
    count: int,
    write: Write,
    *,
    least: int,
    depths: tuple[float, ...] = (),
    **fields: Any,
) -> list[Sample]:
    """Samples whose texts are as large as the length allows, to one unit.

    Args:
        context: The tokenizer, the seed, whether there are turns.
        task: Its name.
        length: Of prompt and answer, in tokens.
        count: Samples, of each depth.
        write: Makes a text.
        least: Its smallest size.
        depths: Where the answers lie.
        **fields: The other attributes of each sample, ``max_tokens`` among them.

    Raises:
        ValueError: The length leaves no room.
    """
    samples = []
    for depth, index, seed in named(context, task, length, count, depths):
        limit = length - fields["max_tokens"]

        def at(size: int, seed: str = seed, depth: float | None = depth) -> tuple[tuple[int, ...], Asked]:
            asked = write(seed, size, depth)
            return tokens_of(context, asked), asked

        try:
            prompt, asked = at(largest(lambda size: len(at(size)[0]), limit=limit, low=least))
        except NoRoom as error:
            raise ValueError(
                f"{task}: {length} tokens leave no room: the shortest prompt has {error.shortest} and its answer "
                f"takes {fields['max_tokens']}; take a longer one"
            ) from None
        samples.append(Sample(task, length, index, prompt, asked.references, depth=depth, **fields))
    return samples


def generator(seed: str, part: str) -> random.Random:
    """For one part of a text, so that the others don't change when it grows."""
    return random.Random(f"{seed} {part}")
