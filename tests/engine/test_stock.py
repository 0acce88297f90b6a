"""Where nothing may be sparse, TRIMIX is stock vLLM: token for token, bit for bit; and what the Python API refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.engine.models import save_tiny_llama
from tests.engine.run import Result, prompts, run_job

LENGTHS = [1, 60, 130, 500]
WRONG: list[Any] = [
    "of",
    True,
    None,
    1,
    0.5,
    ["off"],
    {"off": "off"},
    [["off"] * 1000],
    "off" * 100_000,
    "off\0",
    " off",
]
UNKNOWN = ["trimix_dense", "trimix_off", "trimix-off", "trimixes", "Trimix", "TRIMIX", "trimix ", "trimix\0"]
BAD = [{"trimix": value} for value in WRONG] + [{key: "off"} for key in UNKNOWN]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", num_heads=4, num_kv_heads=2)


def run(model: Path, tmp_path: Path, trimix: dict[str, Any] | None) -> Result:
    wave = [{"prompt": prompt, "max_tokens": 12} for prompt in prompts(LENGTHS)]
    engine: dict[str, Any] = {"max_num_batched_tokens": 200, "dtype": "bfloat16"}
    if trimix is None:
        engine |= {"attention_backend": "CPU_ATTN", "additional_config": {}}
    return run_job(tmp_path, model, [wave], engine=engine, trimix=trimix, bad_extra_args=BAD)


def test_below_the_threshold_and_with_an_empty_set(model: Path, tmp_path: Path) -> None:
    stock = run(model, tmp_path, None)
    assert stock.rows == {}
    assert stock.refusals == ["accepted"] * len(BAD)
    below = run(model, tmp_path, {"min_prompt_len": 501})
    assert below.rows["triangle"] == 0
    assert below.rows["short_prompt"] == sum(LENGTHS)
    empty = run(model, tmp_path, {"starting_layer": None, "layers": ""})
    assert empty.rows["triangle_layer_rows"] == 0
    assert empty.rows["empty_set"] == sum(LENGTHS)
    assert below.waves == empty.waves == stock.waves
    sparse = run(model, tmp_path, {})
    assert sparse.rows["triangle"] > 0
    assert sparse.waves != stock.waves, "the mask changed nothing: this test proves nothing"
    for result in (below, empty, sparse):
        wrong, unknown = result.refusals[: len(WRONG)], result.refusals[len(WRONG) :]
        assert all("allowed values: 'on' (default), 'triangle'" in refusal for refusal in wrong)
        assert "trimix_dense is internal" in unknown[0]
        assert all("is unknown; use vllm_xargs.trimix with" in refusal for refusal in unknown[1:])
        assert " BUT " not in "".join(result.refusals)
        assert all(len(refusal) < 1000 for refusal in result.refusals)
