"""Passes that share what lies below the first triangle layer, against whole ones; what a quality is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.probing.families import config_of, toy
from tests.probing.models import FAMILIES, circuit, question, sample, tiny
from vllm_trimix.hf_attention import use_triangle
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing.gradient import Sample, answer_logits
from vllm_trimix.probing.passes import TriangleModel, own_answer

PATTERN = Triangle(3, 17, 9)


def whole(model: Any, probe: Sample, layers: list[int]) -> torch.Tensor:
    """[answer tokens, vocabulary] log-probabilities of a pass of its own."""
    settings = use_triangle(model, layers=layers, n_init=3, n_local=17, last_n=9)
    settings.prompt_len = len(probe.prompt)
    try:
        with torch.no_grad():
            return torch.log_softmax(answer_logits(model, probe).double(), -1)
    finally:
        settings.remove()


@pytest.mark.parametrize("name", [*FAMILIES, "gemma2"])
@pytest.mark.filterwarnings("ignore:TRIMIX")
def test_shared_passes_are_whole_ones(name: str) -> None:
    model, probes = tiny(name), [sample(60, 3), sample(70, 2)]
    with torch.no_grad():
        dense = [torch.log_softmax(answer_logits(model, probe).double(), -1) for probe in probes]
    with TriangleModel(model, PATTERN) as triangle:
        able = [layer for layer in range(4) if layer not in triangle.stock]
        sets = [able[at:] for at in range(len(able))] + [[layer] for layer in able]
        found = [[triangle.quality(probe, layers) for layers in sets] for probe in probes]
        assert triangle.reuses
    for probe, reference, qualities in zip(probes, dense, found, strict=True):
        answer = torch.tensor(probe.answer)[:, None]
        for layers, quality in zip(sets, qualities, strict=True):
            now = whole(model, probe, layers)
            assert quality.logprob == pytest.approx(float(now.gather(1, answer).sum()), abs=1e-5)
            kl = torch.nn.functional.kl_div(now, reference, log_target=True, reduction="none").sum(-1)
            assert quality.kl == pytest.approx(float(kl.sum()), rel=1e-4, abs=1e-6)
            assert quality.kl_first == pytest.approx(float(kl[0]), rel=1e-4, abs=1e-6)
    assert max(quality.kl for quality in found[0]) > 1e-4


@pytest.mark.parametrize("family", ["qwen3_next", "zamba2", "nemotron_h"])
def test_hybrids_too(family: str) -> None:
    model = toy(config_of(family)).float()
    probe = sample(60, 3)
    with TriangleModel(model, PATTERN) as triangle:
        able = [layer for layer in range(4) if layer not in triangle.stock]
        quality = triangle.quality(probe, able[-1:])
    answer = torch.tensor(probe.answer)[:, None]
    assert quality.logprob == pytest.approx(float(whole(model, probe, able[-1:]).gather(1, answer).sum()), abs=1e-4)


def test_a_model_that_keeps_more_between_its_layers_is_passed_whole() -> None:
    """Layers that leave something beside their outputs: skipping them would leave it out."""
    model, probe = tiny("llama"), sample(60, 3)
    lower, upper = model.model.layers[0], model.model.layers[2]
    plain, left = (lower.forward, upper.forward), []

    def leave(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        left.append(1)
        return plain[0](hidden, *args, **kwargs)

    def find(hidden: Any, *args: Any, **kwargs: Any) -> Any:
        found = plain[1](hidden, *args, **kwargs)
        return found if left and left.pop() else 2 * found

    lower.forward, upper.forward = leave, find
    with TriangleModel(model, PATTERN) as triangle:
        dense = triangle.quality(probe, ())
        now = triangle.quality(probe, (3,))
        assert not triangle.reuses
    # Forward passes that others had given the layers are theirs again.
    assert (lower.forward, upper.forward) == (leave, find)
    del lower.forward, upper.forward
    with TriangleModel(model, PATTERN) as triangle:
        assert triangle.quality(probe, ()) == dense
        assert triangle.quality(probe, (3,)).logprob == pytest.approx(now.logprob, abs=1e-6)


def test_a_dense_answer_diverges_from_nothing() -> None:
    model, probe = tiny("llama"), sample(60, 3)
    with TriangleModel(model, PATTERN) as triangle:
        dense = triangle.quality(probe, ())
        assert (dense.kl, dense.kl_first) == (0, 0)
        assert dense.logprob < 0
        # Everything is seen by a window as long as the prompt.
        assert triangle.quality(probe, (0, 1, 2, 3), pattern=Triangle(0, 100, 0)).kl < 1e-9
        assert triangle.quality(probe, (0, 1, 2, 3)).kl > 1e-4
        assert triangle.quality(probe, ()) == dense
    assert not hasattr(model.model.layers[0].self_attn, "trimix")
    assert "forward" not in model.model.layers[0].__dict__


def test_windowed_layers_are_found() -> None:
    for name, layers in (("gemma2", {0, 2}), ("gemma3", {0, 1, 2, 3}), ("llama", set())):
        with TriangleModel(tiny(name), PATTERN) as triangle:
            assert triangle.stock == dict.fromkeys(layers, "sliding_window")


@pytest.mark.parametrize("lookup", [1, 2, 3, 4, 5])
def test_one_layer_at_a_time_finds_the_lookup_layer_at_every_depth(lookup: int) -> None:
    model, tokenizer = circuit(lookup=lookup)
    probe = question(tokenizer, tokens=800, hops=2, seed=3)
    with TriangleModel(model, Triangle()) as triangle:
        dense = triangle.quality(probe, ())
        for layer in range(8):
            now = triangle.quality(probe, (layer,))
            assert now.correct is (layer != lookup)
            assert (dense.logprob - now.logprob > 5) is (layer == lookup)
        others = set(range(8)) - {lookup}
        assert triangle.quality(probe, others).logprob == pytest.approx(dense.logprob, abs=1e-6)


def test_own_answers_are_the_likeliest_tokens() -> None:
    model = tiny("llama")
    # Settings of the model's own that change what is likeliest.
    model.generation_config.repetition_penalty = 5.0
    prompt = sample(40, 1).prompt
    said = own_answer(model, prompt, tokens=5)
    sequence = list(prompt)
    for token in said:
        with torch.no_grad():
            likeliest = int(model(torch.tensor([sequence])).logits[0, -1].argmax())
        assert token == likeliest
        sequence.append(token)
    assert len(said) == 5 or said[-1] == model.config.eos_token_id
