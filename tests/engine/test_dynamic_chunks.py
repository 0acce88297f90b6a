"""How far answers move when the scheduler cuts the prompt elsewhere: the bound that docs/patterns.md states."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cpu import fast_dtype
from tests.engine.run import ROOT, run_job
from tests.engine.test_dynamic_circuit import CHUNK, FLEXPREFILL, LENGTH, SPEC, VERTICAL_SLASH, asked
from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.trained_spec import SIZES
from vllm_trimix.demo.trained_task import make_trained_prompt, trained_vocabulary

# Nats of an answer token's log-probability between any two ways to cut the prompt, in bf16.
CIRCUIT_BOUND = 0.001
TRAINED_BOUND = 0.1
TRAINED = {
    "vertical_slash": {"pattern": "vertical_slash", "vertical_size": 30, "slash_size": 50},
    "flexprefill": {"pattern": "flexprefill", "gamma": 0.9, "tau": 0.1, "block_size": 64},
    "xattention": {"pattern": "xattention", "threshold": 0.8, "block_size": 64},
}


def spread(runs: list[list[list[float]]]) -> float:
    """Largest difference of one token's log-probability between runs."""
    return max(
        abs(a - b)
        for run in runs[1:]
        for first, other in zip(runs[0], run, strict=True)
        for a, b in zip(first, other, strict=True)
    )


@pytest.mark.slow
@pytest.mark.parametrize("pattern", [VERTICAL_SLASH, FLEXPREFILL], ids=lambda pattern: pattern["pattern"])
def test_circuit(pattern: dict[str, Any], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    make_demo_model(tmp_path / "model", SPEC)
    samples = asked(AutoTokenizer.from_pretrained(tmp_path / "model"), 2, 2)
    waves = [[{"prompt": list(sample.prompt), "max_tokens": 2}] for sample in samples]
    trimix = {"layers": "4,5,7", "shallow": {**pattern, "min_seq_len": 0}}
    runs = []
    # The alias stands at the end of a chunk in all of them.
    for chunk in (CHUNK // 2, CHUNK):
        engine = {
            "max_model_len": LENGTH + 64,
            "max_num_batched_tokens": chunk,
            "dtype": fast_dtype(),
            "additional_config": {"trimix": trimix},
        }
        result = run_job(tmp_path, tmp_path / "model", waves, engine=engine)
        for sample, (said,) in zip(samples, result.waves, strict=True):
            assert said["tokens"] == [*sample.answer, said["tokens"][-1]][:2]
        runs.append([said["logprobs"] for (said,) in result.waves])
    assert spread(runs) <= CIRCUIT_BOUND


@pytest.mark.slow
@pytest.mark.parametrize("name", TRAINED)
def test_trained(name: str, tmp_path: Path) -> None:
    words = trained_vocabulary(SIZES["small"].keys)
    prompts = [make_trained_prompt(records=96, seed=seed) for seed in range(1000, 1020)]
    wave = [
        {"prompt": [words.index(word) for word in ("<s>", *prompt.prompt.split())], "max_tokens": 1}
        for prompt in prompts
    ]
    runs = []
    for chunk in (64, 100, 512):
        result = run_job(
            tmp_path,
            ROOT / "tests/data/trained-small",
            [[request] for request in wave],
            engine={
                "dtype": fast_dtype(),
                "max_model_len": SIZES["small"].max_positions,
                "max_num_batched_tokens": chunk,
                "additional_config": {
                    "trimix": {"layers": "", "last_n": 4, "shallow": {**TRAINED[name], "min_seq_len": 0}}
                },
            },
        )
        assert [words[said["tokens"][0]] for (said,) in result.waves] == [prompt.answer for prompt in prompts]
        assert result.rows["dynamic"] > 0
        runs.append([said["logprobs"] for (said,) in result.waves])
    assert spread(runs) <= TRAINED_BOUND
