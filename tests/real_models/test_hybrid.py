"""A pretrained hybrid: three full layers among windows, all three under the triangle, and the needle is found."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer

from tests.real_models.asking import ANSWER_TOKENS, OFF, answered, is_found, needle
from tests.real_models.fetched import fetched
from tests.tiers import Tier

pytestmark = [pytest.mark.slow, pytest.mark.tier("L"), pytest.mark.timeout(1800)]

FULL = {5, 11, 17}
# Some 4,000 tokens.
SENTENCES = 380
BOS = 2


def test_a_needle_in_4k_tokens(tmp_path: Path, tier: Tier) -> None:
    model = fetched("gemma3-270m")
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    prompt, number = needle(tokenizer, 0, sentences=SENTENCES, depth=0.3, chat=False)
    assert prompt[0] == BOS
    assert 3500 < len(prompt) < 4500
    asked = {"prompt": prompt, "max_tokens": ANSWER_TOKENS}
    trimix = {"layers": ",".join(map(str, sorted(FULL))), "min_prompt_len": 0}
    found = answered(
        tmp_path / "engine", model, [[{**asked, "extra_args": OFF}], [asked]], trimix=trimix, max_model_len=4608
    )
    (dense,), (sparse,) = found["waves"]
    assert is_found(tokenizer, dense, number)
    assert is_found(tokenizer, sparse, number)
    assert dense["logprobs"] != sparse["logprobs"], "the mask changed nothing"
    assert {int(name.split(".")[2]) for name in found["layer_rows"]} == FULL
    assert set(found["layer_rows"].values()) == {len(prompt) - 128}
    tier.case("needle", "gemma3-270m", len(prompt), triangle=True)
