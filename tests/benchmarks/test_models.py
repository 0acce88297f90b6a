"""What a benchmark asks of its model's folder before an engine starts."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import models

CONFIG = {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "hidden_size": 4096}


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder, on a CPU machine with 64 GiB free."""
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    monkeypatch.setattr(models.shutil, "which", lambda name: None)
    monkeypatch.setattr(models.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * 2**30))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return tmp_path


def test_a_cpu_engine_gets_a_cache_for_its_prompts(model: Path) -> None:
    # 256 KiB a token in fp32: 2 GiB for 8192 tokens, more where it is a quarter of what is free.
    assert models.kv_cache_space(model, 8192) == {"VLLM_CPU_KVCACHE_SPACE": "16"}
    assert models.kv_cache_space(model, 8192, engines=16) == {"VLLM_CPU_KVCACHE_SPACE": "3"}
    with pytest.raises(ValueError, match=r"262144 tokens takes 64\.1 GiB"):
        models.kv_cache_space(model, 262144)


def test_the_users_own_choice_wins(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert models.kv_cache_space(model, 8192, arguments=["--gpu-memory-utilization=0.3"]) == {}
    assert models.kv_cache_space(model, 8192, arguments=["--kv_cache_memory_bytes", "7"]) == {}
    monkeypatch.setattr(models.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert models.kv_cache_space(model, 262144) == {}
    monkeypatch.setattr(models.shutil, "which", lambda name: None)
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert models.kv_cache_space(model, 262144) == {}


def test_lengths_are_the_models_own_stretched_ones(model: Path) -> None:
    rope = {"rope_type": "linear", "factor": 4.0}
    (model / "config.json").write_text(json.dumps({**CONFIG, "max_position_embeddings": 4096, "rope_scaling": rope}))
    models.check_lengths([16000], model, answer_tokens=384)
    with pytest.raises(ValueError, match=r"exceed the model's 16384; choose at most 16000"):
        models.check_lengths([16001], model, answer_tokens=384)
