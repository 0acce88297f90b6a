"""RULER's thirteen tasks (arXiv 2404.06654), through lm-evaluation-harness where their data can be had."""

from __future__ import annotations

from vllm_trimix.demo.haystacks import records_only, repeated, varied
from vllm_trimix.demo.languages import ENGLISH, RECORDS, VAULT
from vllm_trimix.evaluation import documents, haystack, lm_eval_ruler
from vllm_trimix.evaluation.making import Write, fill
from vllm_trimix.evaluation.own_languages import records, vault, vault_hops
from vllm_trimix.evaluation.sample import Sample
from vllm_trimix.evaluation.suite import Context, MakeSamples, Suite, Unavailable

OWN_SOURCE = "own: prose instead of essays (no network)"
OWN_DOCUMENTS_SOURCE = "own: fictional documents (no network)"

TASKS = (
    *("niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3"),
    *("niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2"),
)
# In place of those whose data can't be had.
_OWN: dict[str, Write] = {
    "niah_single_2": haystack.needles(),
    "niah_single_3": haystack.needles(kind="uuids"),
    "niah_multikey_1": haystack.needles(keys=4),
    "niah_multivalue": haystack.needles(values=4),
    "niah_multiquery": haystack.needles(keys=4, queries=4),
    "qa_1": documents.one_hop(),
    "qa_2": documents.two_hop(),
}


def _published(task: str) -> MakeSamples:
    def make(context: Context, length: int, count: int) -> list[Sample]:
        lm_eval_ruler.check_installed()
        try:
            return lm_eval_ruler.samples(context, task, length, count)
        except Unavailable as reason:
            if task not in _OWN:
                raise
            context.note(f"{task}: our own prompts, not to be compared with published scores: {reason}")
            return own(context, task, length, count)

    return make


def own(context: Context, task: str, length: int, count: int) -> list[Sample]:
    """Our own prompts for a task whose data can't be had: the same question over other texts."""
    questions = task.startswith("qa")
    return fill(
        context,
        task,
        length,
        count,
        _OWN[task],
        least=2 if questions else 4,
        max_tokens=documents.ANSWER_TOKENS if questions else haystack.ANSWER_TOKENS,
        metric="any" if questions else "all",
        source=OWN_DOCUMENTS_SOURCE if questions else OWN_SOURCE,
    )


RULER = Suite(
    name="ruler",
    summary="RULER's thirteen tasks: needles, variable tracking, word counts, questions",
    tasks={
        ENGLISH: {task: _published(task) for task in TASKS},
        VAULT: {
            "niah_single_1": vault("niah_single_1", lambda tokens, seed, _: repeated(tokens=tokens, seed=seed)),
            "niah_single_2": vault(
                "niah_single_2", lambda tokens, seed, _: varied(tokens=tokens, records=1, seed=seed)
            ),
            "niah_multikey_1": vault(
                "niah_multikey_1", lambda tokens, seed, _: varied(tokens=tokens, records=4, seed=seed)
            ),
            "niah_multikey_2": vault("niah_multikey_2", lambda tokens, seed, _: records_only(tokens=tokens, seed=seed)),
            "vt": vault_hops("vt", hops=2),
        },
        RECORDS: {"niah_multikey_2": records("niah_multikey_2")},
    },
)
