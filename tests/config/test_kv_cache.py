"""How large a KV cache a measuring command's engine gets on a CPU."""

from __future__ import annotations

import pytest

from vllm_trimix.config.kv_cache import cache_bytes, fitting_tokens, token_bytes

GIB = 2**30
SPARE = 2**27


def test_it_has_room_for_the_longest_prompt_and_more_where_that_is_cheap() -> None:
    per_token = token_bytes(num_layers=32, num_kv_heads=8, head_size=128, itemsize=2)
    assert per_token == 131072
    # 8192 tokens are 1 GiB: alone where little is free, eight at once where there is much.
    assert cache_bytes(per_token, 8192, free=2 * GIB) == GIB + SPARE
    assert cache_bytes(per_token, 8192, free=16 * GIB) == 4 * GIB
    assert cache_bytes(per_token, 8192, free=1000 * GIB) == 8 * (GIB + SPARE)


def test_what_does_not_fit_is_refused_with_what_it_takes() -> None:
    with pytest.raises(
        ValueError, match=r"131072 tokens takes 16\.1 GiB, and 8\.0 GiB of memory are free; take shorter"
    ):
        cache_bytes(131072, 131072, free=8 * GIB)


def test_the_longest_that_fits_leaves_room_for_the_model() -> None:
    assert fitting_tokens(131072, free=32 * GIB) == (16 * GIB - SPARE) // 131072
    assert fitting_tokens(131072, free=0) == 0
