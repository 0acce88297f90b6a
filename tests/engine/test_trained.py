"""The trained model in a real engine: with the triangle in every layer its answers are still right."""

from __future__ import annotations

from pathlib import Path

from tests.engine.run import ROOT, both_ways, run_job
from vllm_trimix.demo.trained_spec import SIZES
from vllm_trimix.demo.trained_task import make_trained_prompt, trained_vocabulary


def test_answers_are_right(tmp_path: Path) -> None:
    words = trained_vocabulary(SIZES["small"].keys)
    prompts = [make_trained_prompt(records=records, seed=seed) for records in (24, 96) for seed in range(1000, 1010)]
    wave = both_ways([[words.index(word) for word in ("<s>", *prompt.prompt.split())] for prompt in prompts], 2)
    result = run_job(
        tmp_path,
        ROOT / "tests/data/trained-small",
        [wave],
        engine={"dtype": "bfloat16", "max_model_len": SIZES["small"].max_positions, "skip_tokenizer_init": False},
        trimix={"starting_layer": 0, "n_init": 2, "n_local": 6, "last_n": 4},
    )
    said = [[words[token] for token in answer["tokens"]] for answer in result.waves[0]]
    assert said == [[prompt.answer, "</s>"] for prompt in prompts for _ in ("triangle", "off")]
    assert result.rows["triangle"] == sum(prompt.tokens - 4 for prompt in prompts)
    assert result.rows["opt_out"] == sum(prompt.tokens for prompt in prompts)
