"""InfiniteBench's retrieval tasks (arXiv 2402.13718): prompts, answers and scores as published, of any length."""

from __future__ import annotations

import random

from vllm_trimix.demo.haystacks import records_only, repeated
from vllm_trimix.demo.languages import ENGLISH, RECORDS, VAULT
from vllm_trimix.evaluation.making import Asked, fill, generator
from vllm_trimix.evaluation.own_languages import records, vault
from vllm_trimix.evaluation.sample import Sample
from vllm_trimix.evaluation.suite import Context, MakeSamples, Suite
from vllm_trimix.measurement.prompt_text import draw_uuid, json_pairs

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
_HIDDEN = "There is an important info hidden inside a lot of irrelevant text. Find it"
_HEADS = {
    "pass key": f"{_HIDDEN} and memorize it. I will quiz you about the important information.",
    "sequence of digits": f"{_HIDDEN}. I will quiz you about the important information there.",
}


def _key_values(seed: str, size: int, depth: float | None) -> Asked:
    rng = generator(seed, "pairs")
    pairs = [(draw_uuid(rng), draw_uuid(rng)) for _ in range(size)]
    key, value = pairs[int(generator(seed, "gold").random() * size)]
    return Asked(
        "Extract the value corresponding to the specified key in the JSON object below.\n\n"
        f'JSON data:\n{json_pairs(pairs, separator=", ")}\n\nKey: "{key}"',
        (value,),
        "The value associated with the specified key is: ",
        delimiter="\n",
    )


def _kv_retrieval(context: Context, length: int, count: int) -> list[Sample]:
    return fill(context, "kv_retrieval", length, count, _key_values, least=1, max_tokens=50, metric="all")


def _hidden(task: str, what: str, *, max_tokens: int) -> MakeSamples:
    """A number, stated twice, among copies of the same sentences."""

    def write(seed: str, size: int, depth: float | None) -> Asked:
        rng = generator(seed, "number")
        number = _number(rng, repeats=what != "pass key")
        before = int(rng.random() * (size + 1))
        statement = f"The {what} is {number}. Remember it. {number} is the {what}.\n"
        text = NOISE * before + statement + NOISE * (size - before)
        return Asked(f"{_HEADS[what]}\n\n{text}\n\nWhat is the {what}?", (number,), f"The {what} is", delimiter="\n\n")

    def make(context: Context, length: int, count: int) -> list[Sample]:
        return fill(context, task, length, count, write, least=1, max_tokens=max_tokens, metric="first_number")

    return make


def _number(rng: random.Random, *, repeats: bool) -> str:
    """Five digits; for ``repeats`` five more, each a copy of one of those so far, right before it."""
    digits = [str(rng.randint(0, 9)) for _ in range(5)]
    for _ in range(5 if repeats else 0):
        place = rng.randrange(len(digits))
        digits.insert(place, digits[place])
    return "".join(digits)


RETRIEVAL = Suite(
    name="retrieval",
    summary="InfiniteBench's key-value retrieval, passkey and number string",
    tasks={
        ENGLISH: {
            "kv_retrieval": _kv_retrieval,
            "passkey": _hidden("passkey", "pass key", max_tokens=6),
            "number_string": _hidden("number_string", "sequence of digits", max_tokens=12),
        },
        VAULT: {
            "kv_retrieval": vault("kv_retrieval", lambda tokens, seed, _: records_only(tokens=tokens, seed=seed)),
            "passkey": vault("passkey", lambda tokens, seed, _: repeated(tokens=tokens, seed=seed)),
        },
        RECORDS: {"kv_retrieval": records("kv_retrieval")},
    },
)
