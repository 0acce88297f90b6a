"""The proof of a preset: real vLLM, prompts it never saw, ten times as long, with one layer fewer and one more."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="the preset is proven in vLLM")

from tests.cpu import fast_dtype, has_wide_vectors
from tests.engine.run import run_job
from tests.probing.models import question
from vllm_trimix.cli.main import main
from vllm_trimix.config.layers import format_layers
from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec
from vllm_trimix.demo.prompts import make_demo_prompt

LENGTH = 8192 if has_wide_vectors() else 4096


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A circuit model whose lookup layer the probe doesn't know, and the probe's folder."""
    folder = tmp_path_factory.mktemp("served")
    make_demo_model(folder / "model", CircuitSpec(layers=8, lookup_layer=4, answer_layer=6))
    prompts = [make_demo_prompt(tokens=800, hops=1 + seed % 2, seed=seed) for seed in range(8)]
    lines = [json.dumps({"prompt": prompt.prompt, "answer": prompt.answer}) for prompt in prompts]
    (folder / "prompts.jsonl").write_text("\n".join(lines))
    command = ["probe", str(folder / "model"), "--prompts", str(folder / "prompts.jsonl"), "--random-orders", "0"]
    assert main([*command, "--output", str(folder / "out")]) == 0
    return folder / "model", folder / "out"


def right_answers(tmp_path: Path, model: Path, trimix: dict[str, Any], seeds: range) -> dict[int, float]:
    """Share of right answers by hops, at ``LENGTH``, served with this entry."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    asked = [(hops, question(tokenizer, tokens=LENGTH, hops=hops, seed=seed)) for hops in (1, 2) for seed in seeds]
    engine = {"max_model_len": LENGTH + 64, "dtype": fast_dtype(), "additional_config": {"trimix": trimix}}
    requests = [{"prompt": list(sample.prompt), "max_tokens": len(sample.answer)} for _, sample in asked]
    result = run_job(tmp_path, model, [[request] for request in requests], engine=engine)
    assert result.rows["triangle"] == len(asked) * (LENGTH - 128)
    right = {1: 0, 2: 0}
    for (hops, sample), (said,) in zip(asked, result.waves, strict=True):
        right[hops] += said["tokens"] == list(sample.answer)
    return {hops: count / len(seeds) for hops, count in right.items()}


def test_the_chosen_preset_answers_everything(tmp_path: Path, probed: tuple[Path, Path]) -> None:
    model, folder = probed
    assert json.loads((folder / "preset.json").read_text())["layers"] == "0-3,5-7"
    assert right_answers(tmp_path, model, {"preset": str(folder / "preset.json")}, range(100, 103)) == {1: 1, 2: 1}


def test_one_layer_more_is_the_lookup_layer_and_fails(tmp_path: Path, probed: tuple[Path, Path]) -> None:
    """Questions of one hop don't need it."""
    model, folder = probed
    scores = json.loads((folder / "scores.json").read_text())
    order, k = scores["orders"]["gradient"], len(scores["chosen"])
    assert order[k] == 4
    entry = {"layers": format_layers(order[: k + 1])}
    assert right_answers(tmp_path, model, entry, range(100, 102)) == {1: 1, 2: 0}


@pytest.mark.slow
def test_one_layer_fewer_answers_too(tmp_path: Path, probed: tuple[Path, Path]) -> None:
    model, folder = probed
    scores = json.loads((folder / "scores.json").read_text())
    entry = {"layers": format_layers(scores["orders"]["gradient"][: len(scores["chosen"]) - 1])}
    assert right_answers(tmp_path, model, entry, range(100, 104)) == {1: 1, 2: 1}
    assert right_answers(tmp_path, model, {"preset": str(folder / "preset.json")}, range(100, 104)) == {1: 1, 2: 1}
