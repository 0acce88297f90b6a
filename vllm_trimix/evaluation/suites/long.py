"""Long answers: where they part from dense ones, whether they run in circles, whether they keep their form."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

from vllm_trimix.demo.languages import ENGLISH, RECORDS, VAULT
from vllm_trimix.demo.prompts import DemoPrompt, make_demo_prompt
from vllm_trimix.evaluation.haystack import prose
from vllm_trimix.evaluation.making import Asked, Write, fill, generator
from vllm_trimix.evaluation.own_languages import ANSWER_TOKENS as WORD_TOKENS
from vllm_trimix.evaluation.own_languages import vault
from vllm_trimix.evaluation.sample import Sample
from vllm_trimix.evaluation.suite import Context, MakeSamples, Suite

ANSWER_TOKENS = 512
_VAULT_TOKENS = 64
_COPIED, _SECTIONS = 12, 5
_NAMES = ("Adela", "Bruno", "Carla", "Emil", "Flora", "Gustav", "Hedda", "Ivo", "Janna", "Karl", "Lena", "Milo")


def _records(seed: str, size: int, depth: float | None) -> Asked:
    """Records, the first of which are to be copied."""
    rng = generator(seed, "records")
    lines = [json.dumps(_record(rng, number)) for number in range(1, size + 1)]
    return Asked(
        "Here are records, one JSON object a line.\n\n" + "\n".join(lines) + "\n\nCopy all records from the first one "
        "on, in their order, one JSON object a line, and write nothing else.",
        tuple(lines[:_COPIED]),
        "Records:\n",
        delimiter="\n\n",
    )


def _record(rng: random.Random, number: int) -> dict[str, Any]:
    return {"id": number, "name": rng.choice(_NAMES), "year": rng.randint(1800, 1999), "code": rng.randint(1000, 9999)}


def _list(seed: str, size: int, depth: float | None) -> Asked:
    text = " ".join(prose(generator(seed, "prose"), size))
    return Asked(
        f"{text}\n\nList what the text above tells, as a numbered list with one short sentence a line.",
        ("1",),
        "List:\n",
        delimiter="\n\n",
    )


def _sections(seed: str, size: int, depth: float | None) -> Asked:
    text = " ".join(prose(generator(seed, "prose"), size))
    return Asked(
        f"{text}\n\nRetell the text above in {_SECTIONS} short sections of two sentences each. Begin them with the "
        f'lines "Section 1" to "Section {_SECTIONS}".',
        tuple(f"Section {number}" for number in range(1, _SECTIONS + 1)),
        "Sections:\n",
        delimiter="\n\n",
    )


def _long(task: str, write: Write, *, metric: str, least: int) -> MakeSamples:
    def make(context: Context, length: int, count: int) -> list[Sample]:
        fields: dict[str, Any] = {"metric": metric, "max_tokens": ANSWER_TOKENS, "keeps_tokens": True}
        return fill(context, task, length, count, write, least=least, **fields)

    return make


def _going_on(make: MakeSamples) -> MakeSamples:
    """A question of a circuit model, whose answer isn't stopped behind its one word."""

    def longer(context: Context, length: int, count: int) -> list[Sample]:
        samples = make(context, length - _VAULT_TOKENS + WORD_TOKENS, count)
        return [replace(sample, length=length, max_tokens=_VAULT_TOKENS, keeps_tokens=True) for sample in samples]

    return longer


def _one_hop(tokens: int, seed: str, _: float | None) -> DemoPrompt:
    return make_demo_prompt(tokens=tokens, hops=1, seed=seed)


LONG = Suite(
    name="long",
    summary="answers of 512 tokens: agreement by position, repetition, and whether they keep their form",
    tasks={
        ENGLISH: {
            "records": _long("records", _records, metric="copied_records", least=_COPIED),
            "list": _long("list", _list, metric="numbered_lines", least=4),
            "sections": _long("sections", _sections, metric="headings", least=4),
        },
        # Trained models know no word but the answer.
        RECORDS: {},
        VAULT: {"question": _going_on(vault("question", _one_hop))},
    },
    samples=20,
)
