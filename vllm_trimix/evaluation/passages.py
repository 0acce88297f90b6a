"""Passages of long texts, whose continuations are compared: no question is asked of them."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from vllm_trimix.evaluation import making
from vllm_trimix.evaluation.sample import Measure, Sample
from vllm_trimix.evaluation.suite import Context
from vllm_trimix.measurement.prompt_text import token_ids
from vllm_trimix.untrusted import read_text

ANSWER_TOKENS = 64
"""Of a continuation."""


def samples(context: Context, task: str, length: int, count: int) -> list[Sample]:
    """Passages that fill the length, from the texts by turns, each from a place of its own.

    Args:
        context: The tokenizer, the texts and the seed, which with the sample's number decides the place.
        task: Its name.
        length: Of passage and continuation, in tokens.
        count: Samples.

    Raises:
        ValueError: No text is as long, or one can't be read.
    """
    head = tuple(token_ids(context.tokenizer, ""))
    wanted = length - ANSWER_TOKENS - len(head)
    texts = {path: _tokens(context.tokenizer, path) for path in context.documents}
    long = [path for path, tokens in texts.items() if len(tokens) >= wanted > 0]
    if not long:
        longest = max(map(len, texts.values())) + len(head) + ANSWER_TOKENS
        raise ValueError(
            f"--documents: none holds a passage of {length} tokens, the continuation's {ANSWER_TOKENS} among them; "
            f"choose lengths from {len(head) + ANSWER_TOKENS + 1} to {longest}, or give longer texts"
        )
    if len(long) < len(texts):
        short = ", ".join(path.name for path in texts if path not in long)
        context.note(f"{task}: {short}: shorter than {length} tokens")
    found = []
    for _, index, seed in making.named(context, task, length, count):
        path = long[index % len(long)]
        begin = making.generator(seed, "place").randint(0, len(texts[path]) - wanted)
        passage = head + texts[path][begin : begin + wanted]
        found.append(
            Sample(
                task,
                length,
                index,
                passage,
                max_tokens=ANSWER_TOKENS,
                measure=Measure.AGREEMENT,
                source=f"text: {path.name}",
            )
        )
    return found


@lru_cache(maxsize=32)
def _tokens(tokenizer: Any, path: Path) -> tuple[int, ...]:
    text = read_text(path, f"--documents: {path}")
    return tuple(tokenizer(text, add_special_tokens=False, verbose=False).input_ids)
