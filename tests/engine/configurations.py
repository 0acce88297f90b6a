"""Which engines the matrix starts, and what each is asked."""

from __future__ import annotations

from typing import Any, NamedTuple

from tests.engine.run import BOUNDARIES, PATTERN, both_ways, prompts

MODEL_LEN = 2304
# Pages of 32 tokens, one of them vLLM's own: the calm waves fit, the pressing ones until the first answer needs a page.
BLOCKS = 166
NGRAM = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}


class Engine(NamedTuple):
    """Arguments that need an engine of their own.

    Attributes:
        chunk: Tokens a step; None: prompts are not cut.
        prefix_cache: Prefix caching.
        compiled: torch.compile.
        tp: Tensor-parallel ranks.
        ngram: Speculation.
    """

    chunk: int | None
    prefix_cache: bool
    compiled: bool
    tp: int
    ngram: bool

    def __str__(self) -> str:
        words = [f"chunk{self.chunk}" if self.chunk else "whole", f"tp{self.tp}"]
        words += [name for name in ("prefix_cache", "compiled", "ngram") if getattr(self, name)]
        return "-".join(words)

    def arguments(self) -> dict[str, Any]:
        """For ``LLM``."""
        return {
            "max_model_len": MODEL_LEN,
            "max_num_batched_tokens": self.chunk or 4096,
            "enable_chunked_prefill": self.chunk is not None,
            "enable_prefix_caching": self.prefix_cache,
            "enforce_eager": not self.compiled,
            "tensor_parallel_size": self.tp,
            "speculative_config": NGRAM if self.ngram else None,
            "num_gpu_blocks_override": BLOCKS,
        }

    def environment(self) -> dict[str, str]:
        """One core for each rank: small layers gain nothing from a second, and wait for it on a busy machine."""
        return {"VLLM_CPU_OMP_THREADS_BIND": "0|1"} if self.tp == 2 else {"OMP_NUM_THREADS": "1"}


# For each chunk size five rows that hold every pair of the other four values: so every three values occur together.
_COVERING = {
    512: [(1, 1, 1, 0), (1, 0, 0, 1), (0, 1, 0, 1), (0, 0, 1, 1), (0, 0, 0, 0)],
    2048: [(0, 1, 1, 0), (0, 0, 0, 1), (1, 1, 0, 1), (1, 0, 1, 1), (1, 0, 0, 0)],
    None: [(1, 1, 1, 1), (1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)],
}
ENGINES = [
    Engine(chunk, bool(prefix_cache), bool(compiled), 1 + tp, bool(ngram))
    for chunk, rows in _COVERING.items()
    for prefix_cache, compiled, tp, ngram in rows
]
# The fast tests start one: chunks, hits, drafts and preemptions at once.
SAMPLE = [Engine(512, True, False, 1, True)]


class Load(NamedTuple):
    """How an engine is used: one wave each.

    Attributes:
        preempted: More is asked than the cache holds.
        opt_out: Some of the requests opt out, in the same batches.
    """

    preempted: bool
    opt_out: bool

    def __str__(self) -> str:
        return f"{'preempted' if self.preempted else 'calm'}-{'opt_out' if self.opt_out else 'triangle'}"


# In this order: the second hits what the first left in the cache.
LOADS = [Load(False, True), Load(False, False), Load(True, True), Load(True, False)]


def asked(load: Load) -> list[dict[str, Any]]:
    """The wave of a load."""
    if load.preempted:
        # Five of 33 pages each, and a 34th for the answer's end. Of a step's 2048 tokens the second gets all but some
        # of its last rows.
        long = prompts([1026, 1027, 1025, 1028, 1026], seed=2 + load.opt_out)
        return [*both_ways(long[:2], 36), *triangle(long[2:3], 36)] if load.opt_out else triangle(long, 36)
    # The last rows of the first straddle the end of every chunk, those of the second of a small one.
    straddling, small, whole_pages, short = prompts([2053, 515, 768, 131])
    if load.opt_out:
        sparse = [straddling, whole_pages, repeated(300, seed=5)]
        return [*triangle(sparse), *both_ways([small, short, *prompts(BOUNDARIES, seed=1)])]
    tails = prompts([69, 50], seed=6)
    fresh = [*prompts([201, 131], seed=7), repeated(300, seed=8)]
    # Cached rows keep their rule: the earlier prompt's last ones, now in the middle, are dense; and this one's last,
    # then in the middle, are not.
    turns = [{**request, "earlier": 768} for request in triangle([whole_pages + tails[1], whole_pages[:675]])]
    return [*triangle([straddling[:1984] + tails[0]]), *turns, *triangle([small, *fresh, fresh[0]])]


def triangle(found: list[list[int]], max_tokens: int = 6) -> list[dict[str, Any]]:
    return [{"prompt": prompt, "max_tokens": max_tokens} for prompt in found]


def repeated(length: int, *, seed: int) -> list[int]:
    """A prompt full of n-grams that come again."""
    return (prompts([40], seed=seed)[0] * (length // 40 + 1))[:length]


assert PATTERN.last_n == 8, "the lengths above straddle chunks for eight last rows"
