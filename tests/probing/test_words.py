"""What a probe says of the set that failed."""

from __future__ import annotations

import pytest

from vllm_trimix.probing import words
from vllm_trimix.probing.outcome import Tried

ORDER = [2, 0, 1]
NO_LOSS, SURE = [0.0] * 8, [0.5, 0.6] * 4


def tried(k: int, losses: list[float], kl: list[float]) -> Tried:
    return Tried("gradient", 2048, losses={k: losses}, kl={k: kl}, correct={0: 1.0, k: 1.0})


@pytest.mark.parametrize(
    ("found", "said"),
    [
        (tried(1, SURE, NO_LOSS), "1 layer (2) loses 0.5500 nats at 2048 tokens: no number of prompts would allow it."),
        (tried(1, NO_LOSS, SURE), "1 layer (2) diverges by 0.5500 nats at 2048 tokens: no number"),
        (tried(2, SURE, NO_LOSS), "2 layers (0,2) lose 0.5500 nats at 2048 tokens: no number of prompts would allow t"),
        (tried(2, NO_LOSS, SURE), "2 layers (0,2) diverge by 0.5500 nats at 2048 tokens: no number"),
        (tried(1, [0.0, 0.018] * 4, NO_LOSS), "1 layer (2) loses 0.0090 nats at 2048 tokens, at most 0.0154: about "),
    ],
)
def test_the_set_that_failed(found: Tried, said: str) -> None:
    [sentence] = words.failed(found, order=ORDER)
    assert sentence.startswith(said)


def test_more_prompts_than_there_were() -> None:
    [sentence] = words.failed(tried(1, [0.0, 0.018] * 4, NO_LOSS), order=ORDER)
    needed = int(sentence.partition("about ")[2].split()[0])
    assert needed > 8
    assert f"about {needed} held-out prompts instead of 8 would allow it, if that stays so" in sentence


def test_no_set_failed() -> None:
    assert list(words.failed(tried(1, NO_LOSS, NO_LOSS), order=ORDER)) == []
