"""Log-probabilities of generated tokens, real engine against HF fp32 with the mask, however the steps are cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.models import save_tiny_llama
from tests.engine.run import BOUNDARIES, LAYERS, PATTERN, assert_matches_truth, both_ways, count, prompts, run_job
from tests.tiers import Tier

pytestmark = pytest.mark.tier("F")

# They straddle chunks and pages.
LONG = [131, 256, 500, 777]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Any:
    root = tmp_path_factory.mktemp("tiny")

    def model(num_heads: int, num_kv_heads: int) -> Path:
        return save_tiny_llama(root / f"{num_heads}-{num_kv_heads}", num_heads=num_heads, num_kv_heads=num_kv_heads)

    return model


SCENARIOS: dict[str, dict[str, Any]] = {
    "chunk63-gqa1": {"heads": (4, 4), "engine": {"max_num_batched_tokens": 63, "max_num_seqs": 8}},
    "chunk200-gqa4": {"heads": (4, 1), "engine": {"max_num_batched_tokens": 200}},
    "chunk512-gqa8": {"heads": (8, 1), "engine": {"max_num_batched_tokens": 512}},
    "whole-gqa2": {"heads": (4, 2), "engine": {"max_num_batched_tokens": 8192}},
    "page96-gqa2": {"heads": (4, 2), "engine": {"max_num_batched_tokens": 200, "block_size": 96}},
    "compiled": {"heads": (4, 2), "engine": {"max_num_batched_tokens": 200, "enforce_eager": False}},
}


# Of chunks and groups that others have too.
SLOW = ("chunk200-gqa4", "chunk512-gqa8", "page96-gqa2")


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in SCENARIOS],
)
def test_chunks_and_mixed_batches(name: str, tiny: Any, tmp_path: Path, tier: Tier) -> None:
    scenario = SCENARIOS[name]
    model = tiny(*scenario["heads"])
    wave = both_ways(prompts(BOUNDARIES + LONG))
    result = run_job(tmp_path, model, [wave], engine=scenario["engine"])
    assert_matches_truth(model, wave, result.waves[0])
    body = sum(max(0, length - PATTERN.last_n) for length in BOUNDARIES + LONG if length > PATTERN.dense_len)
    assert result.rows["triangle"] == body
    assert result.rows["triangle_layer_rows"] == body * len(LAYERS)
    assert result.rows["opt_out"] == sum(BOUNDARIES + LONG)
    count(tier, "chunks", name, waves=[wave], result=result, engine=scenario["engine"])


def test_chunks_of_one_token(tiny: Any, tmp_path: Path, tier: Tier) -> None:
    model = tiny(4, 2)
    wave = both_ways(prompts([60, 120]), max_tokens=3)
    engine = {"max_num_batched_tokens": 64, "long_prefill_token_threshold": 1, "enable_chunked_prefill": True}
    result = run_job(tmp_path, model, [wave], engine=engine)
    assert_matches_truth(model, wave, result.waves[0])
    assert result.rows["triangle"] == 60 + 120 - 2 * PATTERN.last_n
    # Two requests of each length, never more than four rows a step.
    assert result.rows["steps"] >= 120
    count(tier, "chunks of one token", waves=[wave], result=result, engine=engine)


def test_preempted_and_resumed(tiny: Any, tmp_path: Path, tier: Tier) -> None:
    model = tiny(4, 2)
    lengths = [200, 190, 180, 170]
    wave = both_ways(prompts(lengths), max_tokens=64)
    # 56 pages of 32 tokens hold about seven of the eight finished requests.
    engine = {"max_num_batched_tokens": 200, "num_gpu_blocks_override": 57, "max_model_len": 512}
    result = run_job(tmp_path, model, [wave], engine=engine)
    assert result.metrics["vllm:num_preemptions"] > 0
    assert_matches_truth(model, wave, result.waves[0])
    # Resumed requests compute their prompt rows, and their generated rows, again.
    assert result.rows["triangle"] > sum(lengths) - len(lengths) * PATTERN.last_n
    count(tier, "preempted", waves=[wave], result=result, engine=engine)


def test_prefix_cache_hits(tiny: Any, tmp_path: Path, tier: Tier) -> None:
    """A hit on rows that both prompts compute under the same rule changes nothing."""
    model = tiny(4, 2)
    shared, tails = prompts([320])[0], prompts([90, 150], seed=1)
    first, second = (both_ways([shared + tail]) for tail in tails)
    engine = {"max_num_batched_tokens": 200, "enable_prefix_caching": True}
    result = run_job(tmp_path, model, [first, second], engine=engine)
    for wave, answers in zip((first, second), result.waves, strict=True):
        assert_matches_truth(model, wave, answers)
    assert [answer["cached_tokens"] for answer in result.waves[0]] == [0, 0]
    assert [answer["cached_tokens"] for answer in result.waves[1]] == [320, 320]
    assert result.rows["cached"] == 640
    count(tier, "prefix hits", waves=[first, second], result=result, engine=engine)


def test_ngram_speculation(tiny: Any, tmp_path: Path, tier: Tier) -> None:
    model = tiny(4, 2)
    repeated = [(prompts([40], seed=seed)[0] * 12)[:length] for seed, length in ((2, 300), (3, 431))]
    wave = both_ways(repeated, max_tokens=12)
    engine = {
        "max_num_batched_tokens": 200,
        "speculative_config": {
            "method": "ngram",
            "num_speculative_tokens": 3,
            "prompt_lookup_max": 3,
            "prompt_lookup_min": 1,
        },
    }
    result = run_job(tmp_path, model, [wave], engine=engine)
    assert result.metrics["vllm:spec_decode_num_draft_tokens"] > 0
    assert_matches_truth(model, wave, result.waves[0])
    assert result.rows["triangle"] == 300 + 431 - 2 * PATTERN.last_n
    count(tier, "ngram", waves=[wave], result=result, engine=engine)


@pytest.mark.parametrize(
    ("engine", "env"),
    [
        pytest.param({"tensor_parallel_size": 2}, {"VLLM_CPU_OMP_THREADS_BIND": "0|1"}, id="tp2"),
        # Upstream's eager CPU mode breaks with pipeline stages; compiled works.
        pytest.param(
            {"pipeline_parallel_size": 2, "enforce_eager": False},
            {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
            id="pp2",
        ),
    ],
)
def test_parallel(engine: dict[str, Any], env: dict[str, str], tiny: Any, tmp_path: Path, tier: Tier) -> None:
    model = tiny(4, 2)
    wave = both_ways(prompts(BOUNDARIES + LONG))
    engine = {"max_num_batched_tokens": 200, **engine}
    result = run_job(tmp_path, model, [wave], engine=engine, env=env)
    assert_matches_truth(model, wave, result.waves[0])
    body = sum(length - PATTERN.last_n for length in BOUNDARIES + LONG if length > PATTERN.dense_len)
    assert result.rows["triangle"] == body
    count(tier, "parallel", *engine.items(), waves=[wave], result=result, engine=engine)
