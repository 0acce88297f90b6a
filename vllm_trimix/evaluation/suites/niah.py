"""Needle in a haystack: one statement at every depth of every length."""

from __future__ import annotations

from vllm_trimix.demo.languages import ENGLISH, RECORDS, VAULT
from vllm_trimix.evaluation.haystack import ANSWER_TOKENS, needles
from vllm_trimix.evaluation.making import fill
from vllm_trimix.evaluation.own_languages import records, vault_hops
from vllm_trimix.evaluation.sample import Sample
from vllm_trimix.evaluation.suite import Context, Suite

DEPTHS = tuple(tenth / 10 for tenth in range(11))


def _needle(context: Context, length: int, count: int) -> list[Sample]:
    """RULER's single needle, a number of seven digits, in prose."""
    depths = context.depths or DEPTHS
    return fill(context, "needle", length, count, needles(), least=4, depths=depths, max_tokens=ANSWER_TOKENS)


NIAH = Suite(
    name="niah",
    summary="needle in a haystack: one statement at each depth of each length",
    tasks={
        ENGLISH: {"needle": _needle},
        VAULT: {
            "needle": vault_hops("needle", hops=1, depths=DEPTHS),
            "two_hop": vault_hops("two_hop", hops=2, depths=DEPTHS),
        },
        RECORDS: {"needle": records("needle", depths=DEPTHS)},
    },
    samples=10,
    depths=DEPTHS,
)
