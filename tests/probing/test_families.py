"""Every family of transformers: its layers' numbers, which of them can be sparse, and the mask in those alone."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

from tests.probing.families import NUM_LAYERS, config_of, toy
from tests.probing.models import tokens
from vllm_trimix import hf_attention
from vllm_trimix.hf_attention import install, use_triangle
from vllm_trimix.hf_attention.layers import attention_layers, stock_layers, text_part
from vllm_trimix.patterns.triangle import Triangle

PATTERN = Triangle(n_init=2, n_local=5, last_n=3)
COVERS = Triangle(n_init=2, n_local=200, last_n=3)
LENGTH = 50


def _every_other(reason: str) -> dict[int, str]:
    return {0: reason, 2: reason}


ALL_FULL = """apertus arcee aria_text biogpt bitnet cohere ctrl diffllama dots1 ernie4_5 ernie4_5_moe
falcon_h1 flex_olmo gemma glm glm4 glm4_moe gpt2 gpt_bigcode gpt_neox granite granitemoe granitemoeshared helium
hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe laguna llama minicpm3 minimax_m2 nanochat nemotron olmo
olmo2 olmoe opt persimmon phi qwen2 qwen2_moe qwen3 qwen3_moe seed_oss smollm3 solar_open stablelm zaya""".split()
SOME: dict[str, dict[int, str]] = {
    **dict.fromkeys(
        "afmoe cohere2 cohere2_moe exaone4 exaone_moe gemma2 gemma3_text olmo3 vaultgemma".split(),
        _every_other("sliding_window"),
    ),
    **dict.fromkeys(
        "bamba granitemoehybrid jamba lfm2 lfm2_moe nemotron_h olmo_hybrid qwen3_5_text qwen3_5_moe_text "
        "qwen3_next zamba zamba2".split(),
        _every_other("no_attention"),
    ),
    "cwm": {1: "sliding_window", 3: "sliding_window"},
    "gemma3n_text": _every_other("sliding_window") | {3: "kv_sharing"},
    "gemma4_text": _every_other("sliding_window") | {3: "kv_sharing"},
    "gemma4_unified_text": _every_other("sliding_window"),
    "llama4_text": _every_other("chunked_attention"),
    "mimo_v2_flash": {1: "sliding_window", 3: "sliding_window"},
    "minimax": {1: "no_attention", 3: "no_attention"},
    "modernbert-decoder": {1: "sliding_window", 3: "sliding_window"},
}
NONE: dict[str, dict[int, str]] = {
    **dict.fromkeys(
        "ministral3 mistral mixtral phi3 phimoe starcoder2".split(), dict.fromkeys(range(NUM_LAYERS), "sliding_window")
    ),
    "gpt_oss": {0: "sliding_window", 1: "learned_sinks", 2: "sliding_window", 3: "learned_sinks"},
    "granite_swa": {0: "learned_sinks", 1: "sliding_window", 2: "learned_sinks", 3: "sliding_window"},
    "inkling_text": {0: "sliding_window", 1: "position_bias", 2: "sliding_window", 3: "position_bias"},
    "recurrent_gemma": {0: "no_attention", 1: "no_attention", 2: "sliding_window", 3: "no_attention"},
}
REFUSED = {
    **dict.fromkeys(
        "bloom falcon gptj codegen mpt gpt_neox_japanese openai-gpt rwkv xglm".split(),
        "its attention can't be replaced",
    ),
    **dict.fromkeys("deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite kimi_linear".split(), "MLA models"),
    **dict.fromkeys("mamba falcon_mamba".split(), "has no attention layers"),
}
STOCK = {**{family: {} for family in ALL_FULL}, **SOME, **NONE}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Several blocks of rows in a short prompt; one thread, as toys are too small for more."""
    monkeypatch.setattr(hf_attention, "BLOCK_ROWS", 16)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    out: torch.Tensor = model(tokens(LENGTH)).logits
    return out / out.abs().max()


def masked(model: Any, layers: list[int]) -> torch.Tensor:
    """Transformers' own eager attention everywhere, its own masks with the pattern's added in these layers."""
    modules = attention_layers(model)
    sparse = [modules[layer] for layer in layers]

    def attend(module: Any, q: Any, k: Any, v: Any, attention_mask: Any = None, **given: Any) -> Any:
        if any(module is one for one in sparse):
            positions = torch.arange(LENGTH)
            hidden = ~PATTERN.mask(positions, positions, LENGTH)
            attention_mask = attention_mask.masked_fill(hidden, torch.finfo(torch.float32).min)
        own = inspect.unwrap(type(module).forward).__globals__["eager_attention_forward"]
        return own(module, q, k, v, attention_mask, **given)

    AttentionInterface.register("masked", attend)
    AttentionMaskInterface.register("masked", eager_mask)
    text_part(model).set_attn_implementation("masked")
    found = logits(model)
    text_part(model).set_attn_implementation("eager")
    return found


@pytest.mark.parametrize("family", STOCK)
def test_the_mask_is_in_the_layers_that_can_be_sparse(family: str) -> None:
    model = toy(config_of(family))
    assert stock_layers(model) == STOCK[family]
    able = [layer for layer in range(NUM_LAYERS) if layer not in STOCK[family]]
    plain, truth = logits(model), masked(model, able)
    # Where it hides nothing, and where it isn't asked for, the model says the same: windows, sinks and all.
    settings = install(model, layers=range(NUM_LAYERS), pattern=COVERS)
    assert (logits(model) - plain).abs().max() < 1e-4
    settings.pattern, settings.layers = PATTERN, frozenset(STOCK[family])
    assert (logits(model) - plain).abs().max() < 1e-4
    settings.layers = frozenset(range(NUM_LAYERS))
    found = logits(model)
    assert (found - truth).abs().max() < 1e-4
    assert bool((found - plain).abs().max() > 0.01) is bool(able)
    settings.remove()
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("family", REFUSED)
def test_what_cannot_be_done_is_refused_in_a_line(family: str) -> None:
    with pytest.raises(ValueError, match=REFUSED[family]) as error:
        use_triangle(toy(config_of(family)), layers="1")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", NONE)
def test_a_set_in_which_no_layer_can_be_sparse_is_refused(family: str) -> None:
    with pytest.raises(ValueError, match=r"1 all stay stock in .* \(1 \w+\); eligible: none"):
        use_triangle(toy(config_of(family)), layers="1")


@pytest.mark.parametrize("family", ["qwen3_next", "zamba2", "nemotron_h", "gemma2", "gemma4_text"])
def test_chosen_layers_that_stay_stock_are_named(family: str) -> None:
    model = toy(config_of(family))
    reason = STOCK[family][2]
    with pytest.warns(UserWarning, match=f"stock_layers=2 {reason}: these layers stay as they are"):
        use_triangle(model, layers="1-2")
    with pytest.raises(ValueError, match=f"0,2 all stay stock .*0,2 {reason}.*; eligible: 1"):
        use_triangle(model, layers="0,2")


@pytest.mark.parametrize("family", ["phi3", "mistral", "starcoder2", "mixtral", "phimoe", "gemma2"])
def test_a_window_as_long_as_the_context_hides_nothing(family: str) -> None:
    model = toy(config_of(family, sliding_window=512))
    assert stock_layers(model) == {}
    plain, truth = logits(model), masked(model, list(range(NUM_LAYERS)))
    install(model, layers=range(NUM_LAYERS), pattern=PATTERN)
    assert (logits(model) - truth).abs().max() < 1e-4
    assert (truth - plain).abs().max() > 0.01
    model = toy(config_of(family, sliding_window=511))
    assert set(stock_layers(model).values()) == {"sliding_window"}
