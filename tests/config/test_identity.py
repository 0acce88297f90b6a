"""Who the model is: presets by the id that a cache's layout gives, and proposed by shape everywhere else."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig, Qwen2Config, Qwen3Config

from vllm_trimix.config.identity import known_id, proposal
from vllm_trimix.config.presets import find_preset, preset_names, preset_shapes
from vllm_trimix.config.resolve import resolve

HASH = "b968826d9c46dd6066d109eabc6255188de91218"
QWEN2 = "Qwen/Qwen2.5-7B-Instruct"
QWEN3 = "Qwen/Qwen3-8B"
CACHED = {
    f"/srv/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/{HASH}": QWEN3,
    f"/srv/.cache/huggingface/hub/models--Qwen--Qwen3-8B/snapshots/{HASH}/": QWEN3,
    f"/data/hub/models--Qwen--Qwen3-8B/snapshots/{HASH}/inner": QWEN3,
    f"relative/models--gradientai--Llama-3-8B-Instruct-262k/snapshots/{HASH}": "gradientai/Llama-3-8B-Instruct-262k",
    "~/.cache/modelscope/hub/Qwen/Qwen2___5-7B-Instruct": QWEN2,
    "/srv/.cache/modelscope/hub/models/Qwen/Qwen2___5-7B-Instruct": QWEN2,
    "/srv/.cache/modelscope/models/Qwen/Qwen2___5-7B-Instruct": QWEN2,
    "/srv/.cache/modelscope/hub/Qwen/Qwen2.5-7B-Instruct/": QWEN2,
    "/srv/.cache/modelscope/models/Qwen--Qwen2___5-7B-Instruct/snapshots/master": QWEN2,
    f"/srv/.cache/modelscope/hub/models--Qwen--Qwen2.5-7B-Instruct/snapshots/{HASH}": QWEN2,
    "/srv/.cache/modelscope/hub/models/models--Qwen--Qwen2___5-7B-Instruct": QWEN2,
    QWEN3: QWEN3,
}
OTHERS = [
    "/models/Qwen/Qwen3-8B",
    "/models/Qwen3-8B",
    f"/data/hub/models--me--Qwen3-8B/snapshots/{HASH}",
    f"/data/hub/models--Qwen--Qwen3-8B-AWQ/snapshots/{HASH}",
    "/data/hub/models--Qwen--Qwen3-8B",
    f"/data/hub/datasets--Qwen--Qwen3-8B/snapshots/{HASH}",
    "/srv/.cache/modelscope/hub/Qwen",
    "/srv/.cache/modelscope/hub/datasets/Qwen/Qwen3-8B",
    "/srv/.cache/modelscope",
    "s3://bucket/Qwen/Qwen3-8B",
    "a\0b",
    "",
]
LLAMA = dict(  # noqa: C408
    num_hidden_layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
)
LLAMA_31 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA_31["original_max_position_embeddings"] = 8192
QWEN2_7B = dict(  # noqa: C408
    num_hidden_layers=28,
    hidden_size=3584,
    intermediate_size=18944,
    num_attention_heads=28,
    num_key_value_heads=4,
    vocab_size=152064,
)
QWEN3_8B = dict(  # noqa: C408
    num_hidden_layers=36,
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)


@pytest.mark.parametrize(("path", "model"), CACHED.items())
def test_a_cache_names_the_model(path: str, model: str) -> None:
    assert known_id(path) == model
    entry = find_preset(model)
    assert entry is not None
    resolved = resolve(None, model=path, num_layers=entry["shape"]["num_hidden_layers"])
    assert resolved.source == f"preset:{model}"


@pytest.mark.parametrize("path", OTHERS)
def test_other_folders_name_none(path: str) -> None:
    assert known_id(path) is None
    with pytest.raises(ValueError, match="has no preset for model"):
        resolve(None, model=path, num_layers=36)


def test_a_cache_of_modelscope_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = str(tmp_path / "hub" / "models" / "Qwen" / "Qwen2___5-7B-Instruct")
    assert known_id(path) is None
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path))
    assert known_id(path) == QWEN2
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "hub"))
    assert known_id(path) == QWEN2


def test_a_link_to_a_snapshot_is_the_snapshot(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Qwen--Qwen3-8B" / "snapshots" / HASH
    snapshot.mkdir(parents=True)
    link = tmp_path / "mine"
    link.symlink_to(snapshot)
    assert known_id(str(link)) == QWEN3


def test_shipped_shapes_are_those_of_the_models() -> None:
    shapes = preset_shapes()
    assert shapes.keys() <= set(preset_names())
    assert {id(find_preset(name)) for name in shapes} == {id(find_preset(name)) for name in preset_names()}
    for config, name in (
        (LlamaConfig(**LLAMA), "gradientai/Llama-3-8B-Instruct-262k"),
        (LlamaConfig(**LLAMA, rope_parameters=LLAMA_31), "meta-llama/Llama-3.1-8B-Instruct"),
        (Qwen2Config(**QWEN2_7B), QWEN2),
        (Qwen3Config(**QWEN3_8B), QWEN3),
    ):
        text = proposal(config)
        assert text is not None
        assert f"has the shape of {name}:" in text
        assert f'--additional-config \'{{"trimix": {{"preset": "{name}"}}}}\'' in text


@pytest.mark.parametrize(
    "changes",
    [
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"vocab_size": 151670},
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}},
        {"max_position_embeddings": 131072, "tie_word_embeddings": True},
    ],
)
def test_what_is_made_from_a_presets_model_gets_it_proposed(changes: dict[str, Any]) -> None:
    config = Qwen3Config(**{**QWEN3_8B, **changes})
    with pytest.raises(ValueError, match="no preset for model '/models/mine'") as refused:
        resolve(None, model="/models/mine", num_layers=36, text_config=config)
    message = str(refused.value)
    assert f'\'{{"trimix": {{"preset": "{QWEN3}"}}}}\'' in message
    # Never a number of layers that the preset contradicts.
    assert not re.search(r"starting_layer\W+\d", message)
    assert resolve({"preset": QWEN3}, model="/models/mine", num_layers=36).source == f"preset:{QWEN3}"


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        ({"hidden_size": 2560, "intermediate_size": 9728}, "hidden_size is 4096, here it is 2560"),
        ({"num_key_value_heads": 4}, "num_key_value_heads is 8, here it is 4"),
        ({"num_hidden_layers": 40}, None),
    ],
)
def test_another_shape_is_not_proposed(change: dict[str, int], difference: str | None) -> None:
    text = proposal(Qwen3Config(**{**QWEN3_8B, **change}))
    if difference is None:
        assert text is None
    else:
        assert text is not None
        assert difference in text
        assert "additional-config" not in text


def test_a_configuration_without_these_facts_gets_no_proposal() -> None:
    assert proposal(object()) is None
