"""Prompts made to cost memory: whatever they make a pattern choose, a layer's peak stays under the stated limits."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiers import Tier
from vllm_trimix.backend.dynamic import prefill as dynamic
from vllm_trimix.patterns.estimate import MAX_SCORES

ROOT = Path(__file__).parents[2]

# Budgets at their limits: every row of every head may choose everything.
GREEDY: dict[str, list[dict[str, Any]]] = {
    "vertical_slash": [{"pattern": "vertical_slash", "vertical_size": 2**15, "slash_size": 2**20}],
    "block_sparse": [{"pattern": "block_sparse", "top_k": 2**14}],
    "flexprefill-columns": [{"pattern": "flexprefill", "gamma": 1.0, "tau": 0.0}],
    "flexprefill-blocks": [{"pattern": "flexprefill", "gamma": 1.0, "tau": 1.0}],
    "xattention": [{"pattern": "xattention", "threshold": 1.0, "stride": 4}],
    "a_shape": [{"pattern": "a_shape", "n_init": 2**31 - 1, "n_local": 2**31 - 1}],
    "dense": [{"pattern": "dense"}],
}
GREEDY["mixed"] = [GREEDY[name][0] for name in ("vertical_slash", "block_sparse", "a_shape", "dense")]
"""Heads of one KV head of four kinds: each slab is one KV head, whatever fits."""


def alternating(keys: int) -> list[dict[str, Any]]:
    """Every other key a column of its own: the longest lists that a selection can have."""
    return [{"pattern": "vertical_slash", "vertical_size": keys // 2, "slash_size": 100}]


# Keys gathered and again as the CPU kernel packs them, their lists, and what the choice copies in fp32, twice 64 MiB.
PEAK = 2 * dynamic.MAX_KEY_BYTES + dynamic.MAX_INDEX_BYTES + 2 * 4 * MAX_SCORES


def run(patterns: list[dict[str, Any]], **job: Any) -> dict[str, Any]:
    shape = {"heads": 8, "kv_heads": 4, "keys": 4096, "rows": 320, "head_size": 64, "prompt": "same"}
    child = subprocess.run(
        [sys.executable, "-m", "tests.hostile.memory_child"],
        input=json.dumps({**shape, "patterns": patterns, **job}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=1500,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-3000:]
    found: dict[str, Any] = json.loads(child.stdout)
    assert found["right"], "the kernel left rows unwritten, or wrong"
    assert found["still held"] == 0, "keys of one slab were kept while the next one's were gathered"
    return found


@pytest.mark.tier("I")
def test_limits_hold_when_they_are_small(tier: Tier) -> None:
    """Limits of 2 MiB and 256 KiB: several slabs and several parts, each within them."""
    names = ["mixed", "vertical_slash"] if tier.size(sample=1, full=0) else list(GREEDY)
    limits = {"MAX_KEY_BYTES": 2**21, "MAX_INDEX_BYTES": 2**18}
    for name in [*names, "alternating"]:
        alternates = name == "alternating"
        patterns = alternating(4096) if alternates else GREEDY[name]
        found = run(patterns, **limits, prompt="columns" if alternates else "same")
        assert found["gathered"] <= limits["MAX_KEY_BYTES"]
        assert found["listed"] <= limits["MAX_INDEX_BYTES"]
        # 4096 keys and values of 64 in bf16 are a MiB a KV head: two fit, and one where its heads differ.
        assert found["slabs"] == (4 if name == "mixed" else 2)
        if not alternates:
            assert found["density"] == 1, "not everything was chosen"
        else:
            assert 0.4 < found["density"] < 0.6
            assert found["parts"] > found["slabs"]
        tier.case("small", name)


@pytest.mark.tier("I")
def test_scores_of_a_long_chunk_are_bounded(tier: Tier) -> None:
    """Tiles times blocks grow with the square of a chunk: heads are chosen for in turn."""
    for name, slabs in (("block_sparse", 4), ("xattention", 1)):
        # 5 tiles of 64 blocks of 64, or 3 of 32 of 128: 25600 and 7680 bytes a KV head of two query heads.
        found = run(GREEDY[name], MAX_CHOICE_BYTES=2**15)
        assert found["slabs"] == slabs
        tier.case("scores", name)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.tier("I")
@pytest.mark.parametrize("name", [*GREEDY, "alternating"])
def test_the_peak_of_a_long_prompt(name: str, tier: Tier) -> None:
    """The limits as they are: 512 MiB of keys and values of 32 KV heads, so that only half of the heads fit."""
    alternates = name == "alternating"
    heads = {"heads": 32, "kv_heads": 8, "rows": 320} if alternates else {"heads": 32, "kv_heads": 32, "rows": 64}
    found = run(
        alternating(2**16) if alternates else GREEDY[name],
        **heads,
        keys=2**16,
        prompt="columns" if alternates else "same",
    )
    print(name, {key: round(found[key] / 2**20, 1) for key in ("grown", "gathered", "listed")}, found["parts"])
    assert found["gathered"] <= dynamic.MAX_KEY_BYTES
    assert found["listed"] <= dynamic.MAX_INDEX_BYTES
    assert found["grown"] <= PEAK, f"{found['grown'] / 2**20:.0f} MiB"
    if alternates:
        assert found["parts"] > 1
    elif name != "mixed":
        assert found["gathered"] == dynamic.MAX_KEY_BYTES, "the prompt is too short to reach the limit"
        assert found["slabs"] == 2
    tier.case("peak", name)


@pytest.mark.slow
@pytest.mark.tier("I")
def test_one_head_beyond_the_limit_is_still_computed(tier: Tier) -> None:
    found = run([{"pattern": "dense"}], heads=1, kv_heads=1, keys=2**14, rows=64, MAX_KEY_BYTES=2**20)
    assert found["gathered"] == 4 * 2**20
    assert found["slabs"] == 1
    tier.case("one head", 2**14)
