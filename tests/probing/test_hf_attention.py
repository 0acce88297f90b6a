"""The attention function for transformers against transformers' own attention with the mask spelled out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.budget import assert_within_budget
from tests.probing.models import ALL, FAMILIES, NUM_LAYERS, WINDOWED, tiny, tokens
from vllm_trimix import hf_attention
from vllm_trimix.hf_attention import install, use_triangle
from vllm_trimix.patterns.triangle import Triangle

PATTERN = Triangle(n_init=3, n_local=17, last_n=9)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks of rows in a short prompt."""
    monkeypatch.setattr(hf_attention, "BLOCK_ROWS", 16)


def logits(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        out: torch.Tensor = model(ids, attention_mask=mask).logits
        return out


def masked(model: Any, ids: torch.Tensor, pattern: Triangle) -> torch.Tensor:
    """Transformers' eager attention, the pattern's mask in all layers."""
    positions = torch.arange(ids.shape[1])
    visible = pattern.mask(positions, positions, ids.shape[1])
    return torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("name", ALL)
def test_without_layers_the_model_says_the_same(name: str) -> None:
    model, ids = tiny(name), tokens(90)
    plain = logits(model, ids)
    settings = install(model, layers=[], pattern=PATTERN)
    assert_within_budget(logits(model, ids), tiny(name).double()(ids).logits.detach(), plain)
    settings.remove()
    assert torch.equal(logits(model, ids), plain)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("length", [25, 29, 30, 90, 113])
def test_all_layers_match_the_mask(name: str, length: int) -> None:
    model, ids = tiny(name), tokens(length)
    mask = masked(model, ids, PATTERN)
    plain, dense = logits(model, ids, mask), logits(model, ids)
    truth = logits(tiny(name).double(), ids, mask.double())
    install(model, layers=range(NUM_LAYERS), pattern=PATTERN)
    assert_within_budget(logits(model, ids), truth, plain)
    hidden = length > PATTERN.dense_len
    assert bool((plain - dense).abs().max() > 0.1) is hidden


@pytest.mark.parametrize("name", WINDOWED)
def test_windowed_layers_stay_as_they_are(name: str) -> None:
    windowed = WINDOWED[name][1]
    model, ids = tiny(name), tokens(90)
    dense = logits(model, ids)
    settings = install(model, layers=windowed, pattern=PATTERN)
    assert (logits(model, ids) - dense).abs().max() < 1e-4
    settings.layers = frozenset(range(NUM_LAYERS))
    assert bool((logits(model, ids) - dense).abs().max() > 0.1) is (len(windowed) < NUM_LAYERS)


def test_each_layer_alone_matters() -> None:
    model, ids = tiny("llama"), tokens(90)
    settings = install(model, layers=[], pattern=PATTERN)
    found = []
    for layers in ([], [0], [1], [2], [3], [1, 3]):
        settings.layers = frozenset(layers)
        found.append(logits(model, ids))
    assert all((a - b).abs().max() > 1e-3 for i, a in enumerate(found) for b in found[:i])


def test_generated_tokens_are_dense() -> None:
    """What generate says token by token is what one pass over prompt and answer says under the rule of the prompt."""
    model, ids = tiny("llama"), tokens(70)
    settings = install(model, layers=range(NUM_LAYERS), pattern=PATTERN)
    said = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None)
    settings.prompt_len = 70
    once = logits(model, said)
    assert torch.equal(once[0, 69:-1].argmax(-1), said[0, 70:])
    settings.prompt_len = said.shape[1]
    assert (logits(model, said) - once).abs().max() > 1e-2


def test_a_batch_is_each_prompt_alone() -> None:
    model, ids = tiny("qwen3"), torch.cat([tokens(60, seed=1), tokens(60, seed=2)])
    install(model, layers=range(NUM_LAYERS), pattern=PATTERN)
    both = logits(model, ids)
    for row in range(2):
        assert (both[row] - logits(model, ids[row : row + 1])[0]).abs().max() < 1e-4


def test_padding_is_refused() -> None:
    model, ids = tiny("llama"), tokens(60)
    use_triangle(model, starting_layer=1)
    mask = torch.ones_like(ids)
    logits(model, ids, mask)
    mask[0, :4] = 0
    with pytest.raises(ValueError, match="padded batches are not supported"):
        logits(model, ids, mask)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": "2-9"}, "'9' is outside this model's 4 layers"),
        ({"starting_layer": 4}, "4 is outside this model's 4 layers"),
        ({"layers": "1", "starting_layer": 1}, "two spellings of one setting"),
        ({"layers": "1", "n_local": 0}, "trimix.n_local: 0 is not valid"),
        ({"preset": "nobody/nothing"}, "neither a shipped preset nor a file"),
        ({}, "has no preset for model"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        use_triangle(tiny("llama"), **arguments)


def test_a_model_without_the_interface_is_refused() -> None:
    from transformers import BloomConfig, BloomForCausalLM

    model = BloomForCausalLM(BloomConfig(vocab_size=50, hidden_size=32, n_layer=2, n_head=2))
    with pytest.raises(ValueError, match="its attention can't be replaced"):
        use_triangle(model, layers="1")
