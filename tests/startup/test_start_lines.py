"""What a server says at start is the truth about every layer, and what ``doctor`` foretells is what it says."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "torch_dtype": "float32",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
    # Learned sinks in all layers, a window in every other one: two KV-cache groups.
    "gpt-oss": {
        "architectures": ["GptOssForCausalLM"],
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 128,
    },
    "gemma2": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "sliding_window": 128,
        "query_pre_attn_scalar": 32,
    },
    "gemma3": {
        "architectures": ["Gemma3ForCausalLM"],
        "model_type": "gemma3_text",
        "sliding_window": 128,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "query_pre_attn_scalar": 32,
    },
    # Phi-3-mini-128k's: a window that is longer than the context.
    "wide window": {
        "architectures": ["Phi3ForCausalLM"],
        "model_type": "phi3",
        "num_key_value_heads": 4,
        "sliding_window": 4096,
        "original_max_position_embeddings": 2048,
    },
    "real window": {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 512},
    "large heads": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 512},
    "odd heads": {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "head_dim": 288},
    # Zamba2 numbers its attentions, not its layers.
    "zamba2": {
        "architectures": ["Zamba2ForCausalLM"],
        "model_type": "zamba2",
        "num_hidden_layers": 8,
        "layers_block_type": (["mamba"] * 3 + ["hybrid"]) * 2,
        "hybrid_layer_ids": [3, 7],
        "num_mem_blocks": 2,
        "mamba_d_state": 16,
        "mamba_headdim": 16,
        "n_mamba_heads": 8,
        "mamba_ngroups": 1,
        "mamba_expand": 2,
        "mamba_d_conv": 4,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
        "adapter_rank": 8,
        "use_shared_attention_adapter": False,
    },
    "qwen3-next": {
        "architectures": ["Qwen3NextForCausalLM"],
        "model_type": "qwen3_next",
        "num_hidden_layers": 8,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2,
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    },
    "dual chunks": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "dual_chunk_attention_config": {
            "chunk_size": 1024,
            "local_size": 128,
            "original_max_position_embeddings": 1024,
        },
    },
}
TRIANGLE = {"min_prompt_len": 0, "n_local": 64, "last_n": 16}
LAYERS = {**TRIANGLE, "layers": "0-3"}
SHALLOW = {**TRIANGLE, "layers": "2-3", "shallow": {"pattern": "a_shape", "min_seq_len": 0}}
FULL_ATTENTION = ["--hf-overrides", '{"dual_chunk_attention_config": null}']

# Model, entry, engine flags, stock layers as the line names them, layers that are sparse.
FORETOLD: dict[str, tuple[str, dict[str, Any], list[str], str, list[int]]] = {
    "llama": ("llama", LAYERS, [], "none", [0, 1, 2, 3]),
    "fp8": ("llama", LAYERS, ["--kv-cache-dtype", "fp8"], "0-3:fp8_kv_on_cpu", []),
    "gpt-oss": (
        "gpt-oss",
        LAYERS,
        [],
        "0:sliding_window,1:learned_sinks,2:sliding_window,3:learned_sinks",
        [],
    ),
    "gemma2": ("gemma2", LAYERS, [], "0:sliding_window,1:soft_cap,2:sliding_window,3:soft_cap", []),
    "gemma3": ("gemma3", LAYERS, [], "0:sliding_window,2:sliding_window", [1, 3]),
    "wide window": ("wide window", LAYERS, [], "none", [0, 1, 2, 3]),
    "without its window": ("real window", LAYERS, ["--disable-sliding-window"], "none", [0, 1, 2, 3]),
    "large heads": ("large heads", LAYERS, [], "none", [0, 1, 2, 3]),
    "large heads, shallow": ("large heads", SHALLOW, [], "0-1:head_size", [2, 3]),
    "odd heads, shallow": ("odd heads", SHALLOW, [], "0-1:head_size", [2, 3]),
    "zamba2": ("zamba2", {**TRIANGLE, "layers": "2-7"}, [], "2:no_attention,4-6:no_attention", [3, 7]),
    "one attention": ("zamba2", {**TRIANGLE, "layers": "7"}, [], "none", [7]),
    "qwen3-next": ("qwen3-next", {**TRIANGLE, "layers": "4-7"}, [], "4-6:no_attention", [7]),
    "without dual chunks": ("dual chunks", LAYERS, FULL_ATTENTION, "none", [0, 1, 2, 3]),
}
REFUSED: dict[str, tuple[str, dict[str, Any], list[str], str]] = {
    "real window": (
        "real window",
        LAYERS,
        [],
        "0-3 all stay stock in {model} (sliding_window); no layer of this model is eligible. Leave --attention-backend "
        "unset, or serve it without its window of 512 tokens: --disable-sliding-window, which limits the context to "
        "that",
    ),
    "dual chunks": (
        "dual chunks",
        LAYERS,
        [],
        "TRIMIX does not support dual chunk attention, which {model} asks for. Serve it with full attention: "
        "--hf-overrides '{{\"dual_chunk_attention_config\": null}}'",
    ),
    "no attention": ("zamba2", {**TRIANGLE, "layers": "0-2"}, [], "0-2 all stay stock in {model} (no_attention)"),
}
# Engine arguments, and the rows of one prompt of 300 tokens that TRIMIX counts.
SERVED: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "gemma3": ({}, {"triangle": 284, "triangle_layer_rows": 568}),
    "gpt-oss": ({}, {"stock_layers": 300, "triangle_layer_rows": 0}),
    "fp8": ({"kv_cache_dtype": "fp8"}, {"stock_layers": 300, "triangle_layer_rows": 0}),
    "large heads, shallow": ({}, {"triangle": 284, "triangle_layer_rows": 568, "dynamic_layer_rows": 0}),
    "qwen3-next": ({}, {"triangle": 284, "triangle_layer_rows": 284}),
}
LENGTH = 300


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        (root / name).mkdir()
        (root / name / "config.json").write_text(json.dumps({**SMALL, **config}))
    return {name: str(root / name) for name in MODELS}


@pytest.fixture(scope="module")
def found(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = {name: case[:3] for name, case in FORETOLD.items()} | {name: case[:3] for name, case in REFUSED.items()}
    eager = ["--enforce-eager", "--skip-tokenizer-init"]
    previews = {name: [models[model], entry, [*eager, *flags]] for name, (model, entry, flags) in cases.items()}
    engines = {
        name: [models[FORETOLD[name][0]], FORETOLD[name][1], arguments, LENGTH]
        for name, (arguments, _) in SERVED.items()
    }
    out = tmp_path_factory.mktemp("out") / "found.json"
    process = subprocess.run(
        [sys.executable, "-m", "tests.startup.start_lines", str(out)],
        input=json.dumps({"previews": previews, "engines": engines}),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-4000:]
    result: dict[str, Any] = json.loads(out.read_text())
    return result


@pytest.mark.parametrize("name", FORETOLD)
def test_every_layer_is_named_with_its_reason(found: dict[str, Any], name: str) -> None:
    _, _, _, stock, sparse = FORETOLD[name]
    seen = found["previews"][name]
    assert isinstance(seen, dict), seen
    assert seen["unsure"] is None
    assert (_stock(seen["line"]), seen["sparse"]) == (stock, sparse)
    assert ("NOTHING IS SPARSE" in (seen["warning"] or "")) == (not sparse)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sparse_is_refused_with_the_fix(
    found: dict[str, Any], models: dict[str, str], name: str
) -> None:
    model, _, _, said = REFUSED[name]
    refusal = found["previews"][name]
    assert isinstance(refusal, str), refusal
    assert said.format(model=models[model]) in refusal
    assert "\n" not in refusal


@pytest.mark.parametrize("name", SERVED)
def test_the_server_says_what_was_foretold_and_counts_what_it_says(found: dict[str, Any], name: str) -> None:
    foretold, served = found["previews"][name], found["engines"][name]
    lines = [said for said in served["said"] if said[1].startswith("TRIMIX: ")]
    assert lines[0] == ["INFO", foretold["line"]]
    assert lines[1:] == ([] if foretold["warning"] is None else [["WARNING", foretold["warning"]]])
    (totals,) = served["totals"]
    expected = SERVED[name][1]
    assert {key: totals.get(key, 0) for key in expected} == expected
    if "stock_layers" in expected:
        assert "triangle" not in totals


def _stock(line: str) -> str:
    found = re.search(r" stock_layers=(\S+) ", line)
    assert found is not None, line
    return found[1]
