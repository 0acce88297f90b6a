"""What a wave cost: TRIMIX's row counters against vLLM's own schedule and counters, row by row."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, NamedTuple

from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.stats import TOTALS


class Chunk(NamedTuple):
    """Rows of one request in one step, as vLLM's scheduler said.

    Attributes:
        request: Index in the wave.
        first: Position of the first row.
        rows: How many.
        drafts: Speculated tokens among them.
        resumed: Whether the request comes back from a preemption.
    """

    request: int
    first: int
    rows: int
    drafts: int
    resumed: int


@dataclass
class Ledger:
    """What one wave added.

    Attributes:
        rows: TRIMIX's counters.
        metrics: vLLM's counters.
        chunks: vLLM's schedule, step by step.
    """

    rows: Counter[str]
    metrics: dict[str, float]
    chunks: list[Chunk]

    def metric(self, name: str) -> int:
        """One of vLLM's counters; those of speculation are absent without it."""
        return int(self.metrics.get(f"vllm:{name}", 0))

    def entries(self) -> list[Chunk]:
        """The first chunk of every admission: of new requests and of resumed ones."""
        seen: set[int] = set()
        found = []
        for chunk in self.chunks:
            if chunk.resumed or chunk.request not in seen:
                found.append(chunk)
            seen.add(chunk.request)
        return found

    def facts(self, wave: list[dict[str, Any]], pattern: Triangle) -> dict[str, bool]:
        """What ``tier.case`` records of a wave."""
        entries = self.entries()
        last_rows = {index: len(request["prompt"]) - pattern.last_n for index, request in enumerate(wave)}
        inside = [0 < chunk.first - last_rows[chunk.request] < pattern.last_n for chunk in self.chunks]
        hits = [0 < chunk.first - last_rows[chunk.request] < pattern.last_n for chunk in entries]
        return {
            "triangle": self.rows["triangle"] > 0,
            # What a hit left to compute may start there as well; that is no chunk's end.
            "straddling": sum(inside) > sum(hits),
            "cached": any(chunk.first > 0 for chunk in entries),
            "resumed": any(chunk.resumed for chunk in self.chunks),
        }


def expected_rows(wave: list[dict[str, Any]], ledger: Ledger, pattern: Triangle) -> Counter[str]:
    """The class of every scheduled row, by the rule as the documentation states it, and the rows that none computes."""
    expected: Counter[str] = Counter()
    for chunk in ledger.chunks:
        request = wave[chunk.request]
        prompt_len = len(request["prompt"])
        for position in range(chunk.first, chunk.first + chunk.rows):
            if position >= prompt_len:
                expected["decode"] += 1
            elif (request.get("extra_args") or {}).get("trimix") == "off":
                expected["opt_out"] += 1
            elif prompt_len <= pattern.n_init + pattern.n_local + pattern.last_n:
                expected["short_prompt"] += 1
            elif position >= prompt_len - pattern.last_n:
                expected["last_n"] += 1
            else:
                expected["triangle"] += 1
    for chunk in ledger.entries():
        if not chunk.resumed:
            expected["cached"] += min(chunk.first, len(wave[chunk.request]["prompt"]))
    return expected


def assert_balanced(
    wave: list[dict[str, Any]], answers: list[dict[str, Any]], ledger: Ledger, pattern: Triangle
) -> None:
    """Asserts that every row is counted once, in its class, and that both sides' sums agree.

    ``sparse + dense + cached = scheduled + cached``, where vLLM's counters say what was scheduled: prompt tokens less
    the cached ones, one row for each generated token but a request's last, and the drafts that were not accepted.
    Rows that a preemption makes vLLM compute again are in its schedule only.
    """
    rows = Counter({key: value for key, value in ledger.rows.items() if key not in TOTALS and "dynamic" not in key})
    assert +rows == +expected_rows(wave, ledger, pattern)
    scheduled = sum(chunk.rows for chunk in ledger.chunks)
    assert rows.total() == scheduled + rows["cached"]

    drafts, accepted = ledger.metric("spec_decode_num_draft_tokens"), ledger.metric("spec_decode_num_accepted_tokens")
    assert ledger.metric("prompt_tokens") == sum(len(request["prompt"]) for request in wave)
    assert ledger.metric("prompt_tokens_cached") == rows["cached"]
    assert ledger.metric("generation_tokens") == sum(len(answer["tokens"]) for answer in answers)
    assert ledger.metric("num_preemptions") == sum(chunk.resumed for chunk in ledger.chunks)
    assert drafts == sum(chunk.drafts for chunk in ledger.chunks)

    first_pass = ledger.metric("prompt_tokens") + ledger.metric("generation_tokens") - len(wave) + drafts - accepted
    again = rows.total() - first_pass
    # A request's last step may accept drafts past max_tokens, which vLLM counts as accepted but not as generated.
    beyond = sum(max((c.drafts for c in ledger.chunks if c.request == index), default=0) for index in range(len(wave)))
    if ledger.metric("num_preemptions"):
        assert again > 0
    else:
        assert 0 <= again <= beyond, (
            f"{rows.total()} rows, but vLLM's counters say {first_pass} and up to {beyond} more"
        )
