"""Models without weights: their configs are what HF builds the real shapes from."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from vllm_trimix.cli.main import main
from vllm_trimix.config.resolve import resolve
from vllm_trimix.demo.bench_model import SHAPES, make_bench_model
from vllm_trimix.demo.prompts import make_demo_prompt
from vllm_trimix.demo.vocabulary import vocabulary

# Of the published checkpoints: parameters, rope_theta, rms_norm_eps.
PUBLISHED = {
    "llama-3.1-8b": (8_030_261_248, 500_000.0, 1e-5),
    "llama-3.2-1b": (1_235_814_400, 500_000.0, 1e-5),
    "qwen2.5-7b": (7_615_616_512, 1_000_000.0, 1e-6),
    "qwen3-8b": (8_190_735_360, 1_000_000.0, 1e-6),
}


def read_config(directory: Path) -> dict[str, object]:
    return dict(json.loads((directory / "config.json").read_text()))


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_shape_loads_in_its_architecture(name: str, tmp_path: Path) -> None:
    import torch

    make_bench_model(tmp_path, SHAPES[name])
    config = AutoConfig.from_pretrained(tmp_path)
    assert config.architectures == [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    assert config.max_position_embeddings == 131072
    assert config.head_dim == SHAPES[name].head_dim
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    rope = config.rope_parameters
    if name in PUBLISHED:
        assert (model.num_parameters(), rope["rope_theta"], config.rms_norm_eps) == PUBLISHED[name]
    if name.startswith("llama"):
        assert rope["rope_type"] == "llama3"
        assert rope["factor"] == {"llama-3.1-8b": 8.0, "llama-3.2-1b": 32.0}[name]
    else:
        assert rope["rope_type"] == "default"


def test_bench_8l_is_what_benchmarks_expect(tmp_path: Path) -> None:
    make_bench_model(tmp_path, SHAPES["bench-8l"])
    config = read_config(tmp_path)
    assert config["num_hidden_layers"] == 8
    assert config["hidden_size"] == 512
    assert (config["num_attention_heads"], config["num_key_value_heads"], config["head_dim"]) == (8, 2, 64)


def test_files_are_the_same_each_time_and_hold_no_weights(tmp_path: Path) -> None:
    for name in ("a", "b", "b"):
        make_bench_model(tmp_path / name, SHAPES["bench-8l"])
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_demo_prompts_are_in_the_vocabulary(tmp_path: Path) -> None:
    make_bench_model(tmp_path, SHAPES["bench-8l"])
    prompt = make_demo_prompt(tokens=1000, hops=1, seed=0)
    ids = AutoTokenizer.from_pretrained(tmp_path)(prompt.prompt).input_ids
    assert len(ids) == 1000
    assert max(ids) < SHAPES["bench-8l"].vocab_size


def test_trimix_layers_become_a_preset(tmp_path: Path) -> None:
    assert main(["make-bench-model", str(tmp_path), "--trimix-layers", "1,4-7"]) == 0
    resolved = resolve(None, model=str(tmp_path), num_layers=8, model_entry=read_config(tmp_path)["trimix"])
    assert resolved.layers == (1, 4, 5, 6, 7)
    assert (resolved.n_init, resolved.n_local, resolved.last_n) == (8, 512, 128)


def test_no_trimix_entry_unless_asked(tmp_path: Path) -> None:
    make_bench_model(tmp_path, SHAPES["qwen3-8b"])
    assert "trimix" not in read_config(tmp_path)


def test_command_takes_every_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {
        "hidden-size": ("hidden_size", 256),
        "layers": ("num_hidden_layers", 3),
        "heads": ("num_attention_heads", 6),
        "kv-heads": ("num_key_value_heads", 3),
        "head-size": ("head_dim", 32),
        "intermediate-size": ("intermediate_size", 96),
        "vocab-size": ("vocab_size", 20000),
    }
    options = [piece for option, (_, value) in sizes.items() for piece in (f"--{option}", str(value))]
    assert main(["make-bench-model", str(tmp_path), *options]) == 0
    config = read_config(tmp_path)
    assert {key: config[key] for key, _ in sizes.values()} == dict(sizes.values())
    assert "6 heads and 3 KV heads of 32" in capsys.readouterr().out


def test_command_replaces_sizes_of_a_shape(tmp_path: Path) -> None:
    assert main(["make-bench-model", str(tmp_path), "--shape", "qwen3-8b", "--layers", "4"]) == 0
    config = read_config(tmp_path)
    assert (config["num_hidden_layers"], config["hidden_size"], config["model_type"]) == (4, 4096, "qwen3")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--layers", "0"], "layers: 0 is too small; choose at least 1"),
        (["--head-size", "0"], "head_size: 0 is too small; choose at least 1"),
        (["--head-size", "33"], "head_size: 33 is odd, and RoPE turns pairs; choose an even one, e.g. 64"),
        (["--heads", "7"], "heads: 7 is not a multiple of kv_heads (2); change one of them"),
        (["--hidden-size", "510"], "hidden_size: 510 is not a multiple of heads (8); choose e.g. 512"),
        (
            ["--vocab-size", "100"],
            f"vocab_size: 100 is below the {len(vocabulary())} tokens of the demo tokenizer; "
            f"choose at least {len(vocabulary())}",
        ),
        (["--trimix-layers", "4-9"], "trimix.layers: '9' is outside this model's 8 layers (0-7)"),
    ],
)
def test_errors(options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["make-bench-model", str(tmp_path / "model"), *options]) == 2
    assert capsys.readouterr().err == f"vllm-trimix: error: {message}\n"
    assert not (tmp_path / "model").exists()


def test_a_real_model_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds files that are not a demo model; choose a new directory"):
        make_bench_model(tmp_path, SHAPES["bench-8l"])
    assert read_config(tmp_path) == {"model_type": "llama"}


def test_shapes_are_llama_unless_named(tmp_path: Path) -> None:
    shape = dataclasses.replace(SHAPES["bench-8l"], layers=2)
    make_bench_model(tmp_path, shape)
    assert read_config(tmp_path)["architectures"] == ["LlamaForCausalLM"]
