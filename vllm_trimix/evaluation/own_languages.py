"""Samples in the languages of this package's own models: hand-set circuits and trained ones."""

from __future__ import annotations

from collections.abc import Callable

from vllm_trimix.demo.languages import trained_keys
from vllm_trimix.demo.prompts import DemoPrompt, make_demo_prompt
from vllm_trimix.demo.trained_spec import tokens_of
from vllm_trimix.demo.trained_task import make_trained_prompt, records_within
from vllm_trimix.evaluation import making
from vllm_trimix.evaluation.making import Asked
from vllm_trimix.evaluation.sample import Sample
from vllm_trimix.evaluation.suite import Context, MakeSamples

ANSWER_TOKENS = 4
"""Of an answer, which is one word: one token."""


def vault(
    task: str, write: Callable[[int, str, float | None], DemoPrompt], *, depths: tuple[float, ...] = ()
) -> MakeSamples:
    """A task of the circuit models, whose documents ``write`` makes from the tokens, a seed and a depth."""

    def make(context: Context, length: int, count: int) -> list[Sample]:
        samples = []
        for depth, index, seed in making.named(context, task, length, count, depths and (context.depths or depths)):
            try:
                prompt = write(length - ANSWER_TOKENS, seed, depth)
            except ValueError as error:
                raise ValueError(f"{task}: {length} tokens leave no room: {error}") from None
            samples.append(_sample(context, task, length, index, prompt.prompt, prompt.answer, depth))
        return samples

    return make


def vault_hops(task: str, *, hops: int, depths: tuple[float, ...] = ()) -> MakeSamples:
    """A record, or an alias and its record, among others."""
    return vault(
        task,
        lambda tokens, seed, depth: make_demo_prompt(tokens=tokens, hops=hops, seed=seed, depth=depth),
        depths=depths,
    )


def records(task: str, *, depths: tuple[float, ...] = ()) -> MakeSamples:
    """A document of the trained models, with a question about a record anywhere or at a depth."""

    def make(context: Context, length: int, count: int) -> list[Sample]:
        keys = trained_keys(context.tokenizer)
        size = records_within(task, length, ANSWER_TOKENS, keys)
        places = (tokens_of(size) - 3) // 2
        samples = []
        for depth, index, seed in making.named(context, task, length, count, depths and (context.depths or depths)):
            distance = None if depth is None else 2 * (places - round(depth * (places - 1)))
            prompt = make_trained_prompt(records=size, seed=seed, distance=distance, keys=keys)
            samples.append(_sample(context, task, length, index, prompt.prompt, prompt.answer, depth))
        return samples

    return make


def _sample(
    context: Context, task: str, length: int, index: int, text: str, answer: str, depth: float | None
) -> Sample:
    prompt = making.tokens_of(context, Asked(text, (answer,)))
    return Sample(task, length, index, prompt, (answer,), metric="first_word", max_tokens=ANSWER_TOKENS, depth=depth)
