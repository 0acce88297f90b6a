"""Dynamic patterns in the shallow layers: log-probabilities of the real engine against HF fp32, chunk by chunk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.engine.models import save_tiny_llama, true_dynamic_logprobs, true_logprobs
from tests.engine.run import PATTERN, Result, count, prompts, run_job
from tests.tiers import Tier
from vllm_trimix.config.shallow import resolve_shallow

pytestmark = pytest.mark.tier("F")

TRIANGLE_LAYERS = frozenset({2, 3})
LENGTHS = [90, 333, 512, 777]
PATTERNS: dict[str, dict[str, Any]] = {
    "a_shape": {"pattern": "a_shape", "n_init": 4, "n_local": 40},
    "vertical_slash": {"pattern": "vertical_slash", "vertical_size": 30, "slash_size": 60},
    "block_sparse": {"pattern": "block_sparse", "top_k": 3},
    "flexprefill": {"pattern": "flexprefill", "gamma": 0.5, "tau": 0.3, "block_size": 64},
    "xattention": {"pattern": "xattention", "threshold": 0.3, "block_size": 64},
}


def shallow(entry: dict[str, Any]) -> dict[str, Any]:
    return {"starting_layer": 2, "shallow": {"min_seq_len": 0, **entry}}


def requests(choices: list[str], lengths: list[int] = LENGTHS, max_tokens: int = 4) -> list[dict[str, Any]]:
    """Prompts of different lengths, so that each is known by its own."""
    args = {"on": None, "triangle": {"trimix": "triangle"}, "off": {"trimix": "off"}}
    return [
        {"prompt": prompt, "max_tokens": max_tokens, "extra_args": args[choice]}
        for number, choice in enumerate(choices)
        for prompt in prompts([length + number for length in lengths])
    ]


def assert_matches_truth(
    model: Path, wave: list[dict[str, Any]], answers: list[dict[str, Any]], result: Result, trimix: dict[str, Any]
) -> None:
    """Dynamic, triangle and dense requests each against their own truth, within twice the error of the dense ones."""
    resolved = resolve_shallow(
        trimix["shallow"], triangle_layers=TRIANGLE_LAYERS, num_layers=4, num_heads=4, last_n=PATTERN.last_n
    )
    assert resolved is not None
    dynamic = {layer: resolved.heads_of(layer, 0, 4) for layer in resolved.layers}
    errors: dict[str, float] = {"on": 0.0, "triangle": 0.0, "off": 0.0}
    gap = 0.0
    for request, answer in zip(wave, answers, strict=True):
        prompt = request["prompt"]
        choice = (request["extra_args"] or {}).get("trimix", "on")
        layers = frozenset() if choice == "off" else TRIANGLE_LAYERS
        truth = other = true_logprobs(model, prompt, answer["tokens"], layers=layers, pattern=PATTERN)
        spans = result.spans.get(len(prompt), [])
        assert bool(spans) == (choice == "on")
        if spans:
            truth = true_dynamic_logprobs(
                model, prompt, answer["tokens"], layers=layers, pattern=PATTERN, dynamic=dynamic, spans=spans
            )
            gap = max(gap, *(abs(a - b) for a, b in zip(other, answer["logprobs"], strict=True)))
        error = max(abs(a - b) for a, b in zip(truth, answer["logprobs"], strict=True))
        errors[choice] = max(errors[choice], error)
    budget = 2 * errors["off"] + 5e-5
    assert errors["off"] < 1e-2
    assert max(errors["on"], errors["triangle"]) <= budget, errors
    assert gap > 20 * budget, f"dense shallow layers are only {gap} away: this run proves nothing"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "4-2", num_heads=4, num_kv_heads=2)


@pytest.mark.parametrize(
    "name",
    [
        name if name in ("vertical_slash", "flexprefill") else pytest.param(name, marks=pytest.mark.slow)
        for name in PATTERNS
    ],
)
def test_chunks_and_mixed_batches(name: str, tiny: Path, tmp_path: Path, tier: Tier) -> None:
    trimix = shallow(PATTERNS[name])
    wave = requests(["on", "triangle", "off"])
    engine = {"max_num_batched_tokens": 300}
    result = run_job(tmp_path, tiny, [wave], engine=engine, trimix=trimix)
    assert_matches_truth(tiny, wave, result.waves[0], result, trimix)
    sparse = sum(rows for spans in result.spans.values() for _, rows, _ in spans)
    assert result.rows["dynamic_dynamic"] == sparse > 0
    assert result.rows["dynamic_layer_rows"] == 2 * sparse
    assert 0 < float(result.log.split("density_since_start=")[-1].split()[0]) < 1
    count(tier, "dynamic", name, waves=[wave], result=result, engine=engine)


@pytest.fixture(scope="module")
def head_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """MInference's form: other patterns and budgets in each head of each layer."""
    heads = [
        {"0": ["vertical_and_slash", 30, 60, 1], "1": ["stream_llm", 4, 40, 1]},
        {"0": ["vertical_and_slash", 40, 150, 1], "1": ["vertical_and_slash", 30, 50, 1]},
    ]
    layers = [
        {**heads[0], "2": ["stream_llm", 8, 100, 1], "3": ["vertical_and_slash", 35, 70, 1]},
        {**heads[1], "2": ["stream_llm", 16, 64, 1], "3": ["stream_llm", 0, 30, 1]},
        *[{str(head): ["stream_llm", 4, 40, 1] for head in range(4)}] * 2,
    ]
    path = tmp_path_factory.mktemp("heads") / "heads.json"
    path.write_text(json.dumps(layers))
    return str(path)


SCENARIOS: dict[str, dict[str, Any]] = {
    # Two heads of one rank see other entries of the file than the other two.
    "tp2": {
        "engine": {"max_num_batched_tokens": 300, "tensor_parallel_size": 2},
        "env": {"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    },
    "page32-chunk70": {"engine": {"max_num_batched_tokens": 70, "block_size": 32}},
    "page96-whole": {"engine": {"max_num_batched_tokens": 8192, "block_size": 96}},
    "compiled": {"engine": {"max_num_batched_tokens": 300, "enforce_eager": False}},
}


@pytest.mark.parametrize(
    "name",
    [name if name in ("tp2", "page96-whole") else pytest.param(name, marks=pytest.mark.slow) for name in SCENARIOS],
)
def test_patterns_by_head(name: str, tiny: Path, head_file: str, tmp_path: Path, tier: Tier) -> None:
    trimix = shallow({"heads": head_file})
    wave = requests(["on", "off"])
    result = run_job(tmp_path, tiny, [wave], trimix=trimix, **SCENARIOS[name])
    if name == "tp2":
        # Its workers are other processes: what they planned isn't seen here, but follows from the chunks.
        result.spans = run_job(tmp_path, tiny, [wave], trimix=trimix, engine={"max_num_batched_tokens": 300}).spans
    assert_matches_truth(tiny, wave, result.waves[0], result, trimix)
    count(tier, "by head", name, waves=[wave], result=result, engine=SCENARIOS[name]["engine"])


def test_preempted_and_resumed(tiny: Path, tmp_path: Path, tier: Tier) -> None:
    trimix = shallow(PATTERNS["vertical_slash"])
    wave = requests(["on", "off"], [330, 320, 310], max_tokens=64)
    engine = {"max_num_batched_tokens": 200, "num_gpu_blocks_override": 57, "max_model_len": 512}
    result = run_job(tmp_path, tiny, [wave], engine=engine, trimix=trimix)
    assert result.metrics["vllm:num_preemptions"] > 0
    assert_matches_truth(tiny, wave, result.waves[0], result, trimix)
    count(tier, "dynamic", "preempted", waves=[wave], result=result, engine=engine)


def test_prefix_cache_hits(tiny: Path, tmp_path: Path, tier: Tier) -> None:
    """A hit holds what the first request's chunks chose; the truth follows those chunks."""
    trimix = shallow(PATTERNS["xattention"])
    shared, (tail,) = prompts([320])[0], prompts([151], seed=1)
    # Of other lengths, because the engine's chunks are known by the length of their prompt.
    waves = [
        [
            {"prompt": shared + tail[:length], "max_tokens": 4, "extra_args": None},
            {"prompt": shared + tail[: length + 1], "max_tokens": 4, "extra_args": {"trimix": "off"}},
        ]
        for length in (60, 150)
    ]
    engine = {"max_num_batched_tokens": 64, "enable_prefix_caching": True}
    result = run_job(tmp_path, tiny, waves, engine=engine, trimix=trimix)
    # The pattern's choice doesn't depend on where chunks of whole tiles end.
    for prompt_len, spans in result.spans.items():
        if prompt_len == len(shared) + 150:
            spans[:0] = [span for span in result.spans[len(shared) + 60] if span[2] <= 320]
    for wave, answers in zip(waves, result.waves, strict=True):
        assert_matches_truth(tiny, wave, answers, result, trimix)
    assert [answer["cached_tokens"] for answer in result.waves[0]] == [0, 0]
    assert min(answer["cached_tokens"] for answer in result.waves[1]) >= 320
    count(tier, "dynamic", "prefix hits", waves=waves, result=result, engine=engine)


def test_requests_of_other_choices_share_no_blocks(tiny: Path, tmp_path: Path, tier: Tier) -> None:
    prompt = prompts([333])[0]
    waves = [
        [{"prompt": prompt, "max_tokens": 2, "extra_args": args}]
        for args in (None, {"trimix": "triangle"}, {"trimix": "off"}, None, {"trimix": "triangle"}, {"trimix": "off"})
    ]
    engine = {"enable_prefix_caching": True}
    result = run_job(
        tmp_path,
        tiny,
        waves,
        engine=engine,
        trimix=shallow(PATTERNS["vertical_slash"]),
        bad_extra_args=[{"trimix": "shallow"}],
    )
    assert [answer["cached_tokens"] > 0 for (answer,) in result.waves] == [False] * 3 + [True] * 3
    assert [answer["tokens"] for (answer,) in result.waves[:3]] == [answer["tokens"] for (answer,) in result.waves[3:]]
    assert "allowed values: 'on' (default), 'triangle' (shallow layers dense), 'off' (all dense)" in result.refusals[0]
    count(tier, "dynamic", "namespaces", waves=waves, result=result, engine=engine)


@pytest.mark.slow
def test_whole_budget_is_dense(tiny: Path, tmp_path: Path, tier: Tier) -> None:
    """Everything within the budget: the answers of the triangle alone, to rounding."""
    wave = requests(["on", "triangle"])
    wave[len(LENGTHS) :] = [{**request, "extra_args": {"trimix": "triangle"}} for request in wave[: len(LENGTHS)]]
    trimix = shallow({"pattern": "vertical_slash", "vertical_size": 1000, "slash_size": 1000})
    engine = {"max_num_batched_tokens": 300}
    result = run_job(tmp_path, tiny, [wave], engine=engine, trimix=trimix)
    answers = result.waves[0]
    for dynamic, triangle in zip(answers[: len(LENGTHS)], answers[len(LENGTHS) :], strict=True):
        assert dynamic["tokens"] == triangle["tokens"]
        assert dynamic["logprobs"] == pytest.approx(triangle["logprobs"], abs=1e-4)
    assert result.rows["dynamic_dynamic"] > 0
    count(tier, "dynamic", "whole budget", waves=[wave], result=result, engine=engine)
