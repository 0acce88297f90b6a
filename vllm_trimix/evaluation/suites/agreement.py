"""Agreement with dense attention: greedy answers and distributions, whatever the right answer would be."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vllm_trimix.demo.languages import ENGLISH, RECORDS, VAULT
from vllm_trimix.demo.prompts import DemoPrompt, make_demo_prompt
from vllm_trimix.evaluation import haystack, making, passages
from vllm_trimix.evaluation.making import Asked, Write, generator
from vllm_trimix.evaluation.own_languages import ANSWER_TOKENS, records, vault
from vllm_trimix.evaluation.sample import Measure, Sample
from vllm_trimix.evaluation.suite import Context, MakeSamples, Suite
from vllm_trimix.probing.tasks import KV_RETRIEVAL, MULTI_NEEDLE, Task

_MAX_TOKENS = 16
_SUMMARY = "\n\nSummarise the text above in three sentences."


def _drawn(task: Task) -> Write:
    """The probe's prompts of a task."""

    def write(seed: str, size: int, depth: float | None) -> Asked:
        return Asked(task.write(generator(seed, task.name), size).text, (), "Answer:", delimiter="\n")

    return write


def _summary(seed: str, size: int, depth: float | None) -> Asked:
    return Asked(" ".join(haystack.prose(generator(seed, "prose"), size)) + _SUMMARY, (), "Summary:", delimiter="\n")


_KINDS: tuple[Write, ...] = (_drawn(KV_RETRIEVAL), _drawn(MULTI_NEEDLE), _summary)


def _prompts(context: Context, length: int, count: int) -> list[Sample]:
    """The user's, or retrieval from pairs and from prose, and summaries, by turns."""
    given = _of_the_user(context, length, count)
    if given is not None:
        return given

    def write(seed: str, size: int, depth: float | None) -> Asked:
        return _KINDS[int(seed.split()[-1]) % len(_KINDS)](seed, size, depth)

    return making.fill(
        context, "prompts", length, count, write, least=8, max_tokens=_MAX_TOKENS, measure=Measure.AGREEMENT
    )


def _of_the_user(context: Context, length: int, count: int) -> list[Sample] | None:
    """From the files that the user names; None where there are none."""
    if context.prompts is not None:
        return _given(context, context.prompts, length, count)
    return passages.samples(context, "prompts", length, count) if context.documents else None


def _given(context: Context, path: Path, length: int, count: int) -> list[Sample]:
    """The file's prompts that the length holds; nothing is said of their answers."""
    # Heavy: PyTorch.
    from vllm_trimix.probing import prompts

    given = prompts.read(path, context.tokenizer, answers=None, template_arguments=context.template_arguments)
    read = [prompt.sample.prompt for prompt in given]
    samples = [
        Sample("prompts", length, index, prompt, max_tokens=_MAX_TOKENS, measure=Measure.AGREEMENT, source=path.name)
        for index, prompt in enumerate(read)
        if len(prompt) + _MAX_TOKENS <= length
    ]
    shortest = min(map(len, read)) + _MAX_TOKENS
    if not samples:
        raise ValueError(f"prompts: {length} tokens hold none of {path}: the shortest and its answer take {shortest}")
    if len(samples) < len(read):
        context.note(f"prompts: {len(read) - len(samples)} of {len(read)} in {path} are longer than {length} tokens")
    return samples[:count]


def _compared(make: MakeSamples) -> MakeSamples:
    """The same prompts, compared instead of scored."""

    def compared(context: Context, length: int, count: int) -> list[Sample]:
        given = _of_the_user(context, length, count)
        if given is not None:
            return given
        # An answer takes more room here: the documents are those of a shorter length.
        return [
            replace(
                sample, length=length, references=(), metric="all", max_tokens=_MAX_TOKENS, measure=Measure.AGREEMENT
            )
            for sample in make(context, length - _MAX_TOKENS + ANSWER_TOKENS, count)
        ]

    return compared


def _by_turns(tokens: int, seed: str, depth: float | None) -> DemoPrompt:
    """Two hops and one by turns."""
    return make_demo_prompt(tokens=tokens, hops=2 - int(seed.split()[-1]) % 2, seed=seed)


AGREEMENT = Suite(
    name="agreement",
    summary="agreement with dense attention on your prompts (--prompts FILE), long texts or generated prompts",
    tasks={
        ENGLISH: {"prompts": _prompts},
        VAULT: {"prompts": _compared(vault("prompts", _by_turns))},
        RECORDS: {"prompts": _compared(records("prompts"))},
    },
    samples=50,
)
