"""Dynamic patterns in the shallow layers: log-probabilities of the real engine against HF fp32, chunk by chunk."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.models import save_tiny_llama, true_dynamic_logprobs, true_logprobs
from tests.engine.run import PATTERN, Result, run_job
from tests.engine.test_logprobs import prompts
from vllm_trimix.shallow import resolve_shallow

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


@pytest.mark.parametrize("name", PATTERNS)
def test_chunks_and_mixed_batches(name: str, tiny: Path, tmp_path: Path) -> None:
    trimix = shallow(PATTERNS[name])
    wave = requests(["on", "triangle", "off"])
    result = run_job(tmp_path, tiny, [wave], engine={"max_num_batched_tokens": 300}, trimix=trimix)
    assert_matches_truth(tiny, wave, result.waves[0], result, trimix)
    sparse = sum(rows for spans in result.spans.values() for _, rows, _ in spans)
    assert result.rows["dynamic_dynamic"] == sparse > 0
    assert result.rows["dynamic_layer_rows"] == 2 * sparse
    assert 0 < float(result.log.split("density_since_start=")[-1].split()[0]) < 1
