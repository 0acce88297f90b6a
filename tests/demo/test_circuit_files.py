"""The circuit model's weights and files, and the command that writes them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.demo.circuit import SMALL, MakeDemo
from vllm_trimix.cli.main import main
from vllm_trimix.config.resolve import resolve
from vllm_trimix.demo import vocabulary
from vllm_trimix.demo.circuit import HEAD_SIZE, ROPE_THETA, circuit_weights, make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec
from vllm_trimix.demo.codewords import codewords

# Weights and files.


def test_codewords_are_nearly_orthogonal() -> None:
    words = codewords(32767)
    assert words.abs().eq(1).all()
    # The product of two words is a word of the code, so their inner product is that word's sum.
    first, second = torch.arange(1, 32767), torch.arange(2, 32768)
    assert torch.equal(words[first - 1] * words[second - 1], words[(first ^ second) - 1])
    assert words.sum(1).abs().max() == 16
    with pytest.raises(ValueError, match="count: 32768 is above 32767"):
        codewords(32768)


def scores_over_distance(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Score of a query against the same key 0 to 131071 rows before it, from RoPE's definition, fp64."""
    half = HEAD_SIZE // 2
    query, key = query.double(), key.double()
    product = torch.complex(query[:half], query[half:]) * torch.complex(key[:half], -key[half:])
    frequencies = ROPE_THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    turns = torch.exp(1j * torch.arange(131072)[:, None] * frequencies)
    return (turns @ product).real / HEAD_SIZE**0.5


def projection(layer: int, name: str, head: int) -> torch.Tensor:
    return circuit_weights(SMALL)[f"model.layers.{layer}.self_attn.{name}.weight"].unflatten(0, (-1, HEAD_SIZE))[head]


@pytest.mark.parametrize(("head", "offset"), [(0, 1), (1, 2)])
def test_previous_token_heads_do_not_alias(head: int, offset: int) -> None:
    # They read the ballast alone, which is 1 after the norm.
    scores = scores_over_distance(projection(0, "q_proj", head).sum(-1), projection(0, "k_proj", 0).sum(-1))
    assert scores.argmax() == offset
    best, second = scores.topk(2).values
    assert best == pytest.approx(100, rel=1e-5)
    assert best - second > 20


def test_codes_match_at_any_distance() -> None:
    word = codewords(5000)[-1]
    # The lookup compares this token (columns 0 to 63) with the key's token before the previous one (128 to 191).
    query = projection(SMALL.lookup_layer, "q_proj", 0)[:, :64] @ word
    key = projection(SMALL.lookup_layer, "k_proj", 0)[:, 128:192] @ word
    scores = scores_over_distance(query, key)
    assert scores[0] == pytest.approx(60, rel=1e-5)
    assert scores.min() == pytest.approx(60, rel=1e-3)


def test_sharpness_scales_every_score() -> None:
    shape: dict[str, Any] = {"layers": 4, "lookup_layer": 1, "answer_layer": 3, "distractor_heads": 8}
    sharp, soft = (circuit_weights(CircuitSpec(**shape, sharpness=scale)) for scale in (1.0, 0.35))
    for name, weight in sharp.items():
        is_query = name.endswith("q_proj.weight")
        assert weight.any() or not is_query
        torch.testing.assert_close(soft[name], weight * 0.35 if is_query else weight)


def test_files_are_the_same_each_time(tmp_path: Path) -> None:
    for name in ("a", "b", "b"):
        assert main(["make-demo-model", str(tmp_path / name)]) == 0
    files = sorted(path.name for path in (tmp_path / "a").iterdir())
    assert files == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_checkpoint_holds_exactly_the_models_weights(demo: MakeDemo) -> None:
    _, info = AutoModelForCausalLM.from_pretrained(demo(CircuitSpec()).directory, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_config_carries_a_preset(demo: MakeDemo) -> None:
    config = json.loads((demo(CircuitSpec()).directory / "config.json").read_text())
    assert config["max_position_embeddings"] == 131072
    assert set(config["trimix"]) == {"layers", "n_init", "n_local", "last_n", "provenance"}
    assert config["trimix"]["layers"] == "4-7"
    resolved = resolve(None, model="anything", num_layers=8, model_entry=config["trimix"])
    assert resolved.layers == (4, 5, 6, 7)
    assert (resolved.n_init, resolved.n_local, resolved.last_n) == (8, 512, 128)


def test_tokenizer(demo: MakeDemo) -> None:
    tokenizer = demo(SMALL).tokenizer
    ids = tokenizer("The vault code of amber is 4821.").input_ids
    words = ["<s>", "The", "vault", "code", "of", "amber", "is", "4821", "."]
    assert tokenizer.convert_ids_to_tokens(ids) == words
    assert tokenizer.decode(ids[7:8]) == "4821"
    assert tokenizer.convert_ids_to_tokens(tokenizer("Zanzibar").input_ids) == ["<s>", "<unk>"]
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token) == ("<s>", "</s>", "<unk>")


def test_a_chat_is_read_as_one_text(demo: MakeDemo) -> None:
    tokenizer = demo(SMALL).tokenizer
    record = vocabulary.record("amber", "4821")
    chat = [
        {"role": "user", "content": f"{record} {vocabulary.question('amber')}"},
        {"role": "assistant", "content": "4821"},
        {"role": "user", "content": f". {vocabulary.question('amber')}"},
    ]
    text = " ".join(message["content"] for message in chat)
    for generation_prompt in (False, True):
        rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation_prompt)
        assert tokenizer(rendered, add_special_tokens=False).input_ids == tokenizer(text).input_ids
    assert demo(SMALL).ask(text)[0] == "4821"


# The command line.


def test_command_takes_every_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "9", "--lookup-layer", "4", "--answer-layer", "7", "--heads", "6", "--kv-heads", "3"]
    options += ["--sharpness", "0.5", "--distractor-heads", "2", "--dtype", "float32"]
    assert main(["make-demo-model", str(tmp_path / "command"), *options]) == 0
    assert "9 layers, lookup at 4, answer at 7" in capsys.readouterr().out
    spec = CircuitSpec(
        layers=9,
        lookup_layer=4,
        answer_layer=7,
        heads=6,
        kv_heads=3,
        sharpness=0.5,
        distractor_heads=2,
        dtype="float32",
    )
    make_demo_model(tmp_path / "library", spec)
    for path in (tmp_path / "library").iterdir():
        assert path.read_bytes() == (tmp_path / "command" / path.name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--layers 2", "layers: 2 is too few; the circuit needs at least 3 layers"),
        ("--answer-layer 8", "answer_layer: 8 is outside 2-7, .*; choose 7"),
        ("--answer-layer 1 --lookup-layer 0", "answer_layer: 1 is outside 2-7, .*; choose 7"),
        ("--lookup-layer 0", r"lookup_layer: 0 is not between .* layer \(0\) and .* layer \(6\); choose 1-5"),
        ("--lookup-layer 6", r"lookup_layer: 6 is not between .* layer \(0\) and .* layer \(6\); choose 1-5"),
        ("--kv-heads 0", "kv_heads: 0 is too few; choose at least 1"),
        ("--heads 2", r"heads: 2 is not a multiple of kv_heads \(2\) of at least 4, .*; choose e.g. 8"),
        ("--heads 5", r"heads: 5 is not a multiple of kv_heads \(2\) of at least 4, .*; choose e.g. 8"),
        ("--sharpness 0", "sharpness: 0.0 is not a positive number; 1.0 is sharp, 0.35 soft"),
        ("--sharpness nan", "sharpness: nan is not a positive number; 1.0 is sharp, 0.35 soft"),
        ("--distractor-heads 9", "distractor_heads: 9 is outside 0-8, the heads of a layer"),
        ("--distractor-heads -1", "distractor_heads: -1 is outside 0-8, the heads of a layer"),
    ],
)
def test_errors(options: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["make-demo-model", str(tmp_path / "model"), *options.replace(" -1", "=-1").split()]
    assert main(argv) == 2
    assert re.fullmatch(f"vllm-trimix: error: {message}\n", capsys.readouterr().err)
    assert not (tmp_path / "model").exists()


def test_unknown_dtype() -> None:
    with pytest.raises(ValueError, match="dtype: 'float16' is not supported; choose bfloat16 or float32"):
        CircuitSpec(dtype="float16")


def test_a_real_model_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="holds files that are not a demo model; choose a new directory"):
        make_demo_model(tmp_path, CircuitSpec())
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
