"""Layers that stay as they are: in blocks of rows, with nothing of the size of the whole map."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import StaticCache

from tests.probing.families import config_of, toy
from tests.probing.models import tokens
from vllm_trimix import hf_attention
from vllm_trimix.hf_attention import install, stock
from vllm_trimix.patterns.triangle import Triangle

LENGTH = 90
ROWS = 16


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_attention, "BLOCK_ROWS", ROWS)


@pytest.mark.parametrize("family", ["mistral", "gpt_oss", "llama4_text", "gemma3n_text", "granite_swa"])
def test_no_tensor_of_the_size_of_the_map(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, ids = toy(config_of(family)), tokens(LENGTH)
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    plain = model(inputs_embeds=embedded).logits
    truth = torch.autograd.grad(plain.sum(), embedded)[0]
    masks, kept, own = [], [], stock.own_attention

    def watched(module: Any) -> Any:
        def attend(module: Any, q: Any, k: Any, v: Any, mask: Any, **given: Any) -> Any:
            masks.append(mask.shape[-2:])
            return own(module)(module, q, k, v, mask, **given)

        return attend

    monkeypatch.setattr(stock, "own_attention", watched)
    settings = install(model, layers=[], pattern=Triangle())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.shape) or x, lambda x: x):
        logits = model(inputs_embeds=embedded).logits
    assert (logits - plain).abs().max() < 1e-4 * plain.abs().max()
    found = torch.autograd.grad(logits.sum(), embedded)[0]
    assert (found - truth).abs().max() < 1e-4 * truth.abs().max()
    assert masks
    assert max(rows for rows, _ in masks) == ROWS
    if "sliding_window" in set(settings.stock.values()):
        # A window of 20 and the rows of a block, not all keys.
        assert min(keys for rows, keys in masks if rows == ROWS) <= 20 + ROWS
    # No probabilities of a stock layer wait for the backward pass; those of the others are the kernel's business.
    sizes = [shape for shape in kept if len(shape) == 4 and shape[2] == ROWS and shape[3] > 64]
    assert not sizes
    assert not [shape for shape in kept if shape[-2:] == (LENGTH, LENGTH)]


def test_a_mask_that_only_the_forward_pass_knows() -> None:
    """MiniMax gives its window to all attention layers, whatever ``layer_types`` says: not where it was asked for."""
    model, ids = toy(config_of("minimax", sliding_window=20)), tokens(LENGTH)
    with torch.no_grad():
        plain = model(ids).logits
        settings = install(model, layers=[], pattern=Triangle(2, 5, 3))
        assert (model(ids).logits - plain).abs().max() < 1e-4 * plain.abs().max()
        settings.layers = frozenset([2])
        with pytest.raises(ValueError, match=r"layer 2: .* isn't plain causal .*; leave it out of the layers"):
            model(ids)


def test_a_model_that_computes_with_its_mask_is_told() -> None:
    model = toy(config_of("doge", sliding_window=None))
    install(model, layers=[1], pattern=Triangle(2, 5, 3))
    with torch.no_grad(), pytest.raises(ValueError, match="computes with the attention mask itself"):
        model(tokens(LENGTH))


@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "gpt_oss", "zamba2", "gemma4_text", "llama4_text"])
def test_generating_reads_what_the_cache_still_holds(family: str) -> None:
    """A window's cache drops keys: rows and keys are counted from where it begins."""
    model, ids = toy(config_of(family)), tokens(50)
    options: dict[str, Any] = {"max_new_tokens": 24, "do_sample": False, "eos_token_id": None, "output_logits": True}
    plain = model.generate(ids, return_dict_in_generate=True, **options)
    settings = install(model, layers=[], pattern=Triangle(2, 5, 3))
    said = model.generate(ids, return_dict_in_generate=True, **options)
    assert torch.equal(said.sequences, plain.sequences)
    for a, b in zip(said.logits, plain.logits, strict=True):
        assert (a - b).abs().max() < 1e-4 * b.abs().max()
    settings.remove()


@torch.no_grad()
def test_a_static_cache_is_longer_than_what_it_holds() -> None:
    model, ids = toy(config_of("llama")), tokens(LENGTH)
    settings = install(model, layers=[1, 2], pattern=Triangle(2, 5, 3))
    whole = model(ids[:, :-1]).logits
    cache = StaticCache(config=model.config, max_cache_len=LENGTH + 20)
    assert (model(ids[:, :-1], past_key_values=cache).logits - whole).abs().max() < 1e-4 * whole.abs().max()
    step = model(ids[:, -1:], past_key_values=cache).logits
    settings.prompt_len = LENGTH - 1
    assert (step[0, -1] - model(ids).logits[0, -1]).abs().max() < 1e-4 * step.abs().max()
