"""Engines that commands start: the lengths that they take, and the KV cache that they get on a CPU."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from vllm.platforms import current_platform

from vllm_trimix.backend.engines import calibration, cpu_cache
from vllm_trimix.backend.engines.limits import limits
from vllm_trimix.cli import engine_limit
from vllm_trimix.config.context import ALLOW_LONG
from vllm_trimix.config.kv_cache import cache_bytes

SMALL: dict[str, Any] = dict(  # noqa: C408
    vocab_size=256,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=4096,
)
YARN = {
    "max_position_embeddings": 16384,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 5e5,
        "factor": 4.0,
        "original_max_position_embeddings": 4096,
    },
}
LINEAR = {"rope_type": "linear", "rope_theta": 5e5, "factor": 4.0}
FACTORS = [1.0] * 8
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "long_factor": FACTORS, "short_factor": FACTORS}


def write(folder: Path, config: Any) -> str:
    config.architectures = [f"{type(config).__name__.removesuffix('Config')}ForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write(tmp_path_factory.mktemp("plain"), LlamaConfig(**SMALL))


@pytest.mark.parametrize(
    ("flags", "long", "expected"),
    [
        ([], "0", (4096, 4096)),
        (["--max-model-len", "2048"], "0", (2048, 2048)),
        (["--hf-overrides", json.dumps(YARN)], "0", (None, 16384)),
        (["--max-model-len", "8192", "--hf-overrides", json.dumps(YARN)], "0", (8192, 8192)),
        ([], "1", (None, 4096)),
        (["--max-model-len", "8192"], "1", (8192, 8192)),
    ],
)
def test_vllm_says_how_long_prompts_may_be(
    plain: str, flags: list[str], long: str, expected: tuple[int | None, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(ALLOW_LONG, long)
    found = limits(model=plain, flags=["--skip-tokenizer-init", *flags], lengths=[1024, 8192])
    assert (found["longest"], found["usual"]) == expected


@pytest.mark.parametrize(
    ("config", "usual"),
    [
        (LlamaConfig(**SMALL, rope_parameters=LINEAR), 16384),
        (
            Phi3Config(**{**SMALL, "max_position_embeddings": 65536}, original_max_position_embeddings=4096,
                       pad_token_id=0, rope_parameters=LONGROPE),
            65536,
        ),
    ],
    ids=["linear", "longrope"],
)  # fmt: skip
def test_stretched_models_take_their_whole_length(config: Any, usual: int, tmp_path: Path) -> None:
    model = write(tmp_path, config)
    found = limits(model=model, flags=["--skip-tokenizer-init"], lengths=[usual, 2 * usual])
    assert found == {"longest": usual, "usual": usual}


def test_a_length_that_vllm_does_not_take_is_refused(plain: str) -> None:
    with pytest.raises(ValueError, match="max_model_len"):
        limits(model=plain, flags=["--skip-tokenizer-init", "--max-model-len", "8192"], lengths=[8192])
    job: dict[str, Any] = {"trimix": {"layers": "1"}, "shortest": 256, "longest": 131072}
    with pytest.raises(ValueError, match=r"--max-length: 8192 prompt tokens .* exceed the 4096 tokens"):
        calibration.configure(model=plain, flags=["--skip-tokenizer-init"], max_length=8192, **job)


def arguments(model: str, *flags: str) -> Any:
    return SimpleNamespace(model=model, flags=list(flags), server=None, served=None)


def test_the_command_asks_where_flags_decide(plain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = LlamaConfig(**SMALL)
    override = json.dumps(YARN)
    asked = engine_limit.find(arguments(plain, "--hf_overrides", override), config, [8192])
    assert asked[:2] == (None, 16384)
    with pytest.raises(ValueError, match="max_model_len"):
        engine_limit.find(arguments(plain, "--max-model-len=8192"), config, [8192])
    # Without such flags no process is started.
    monkeypatch.setattr(engine_limit, "EngineProcess", None)
    assert engine_limit.find(arguments(plain, "--enforce-eager", "--dtype", "float32"), config, [1])[:2] == (4096, 4096)


def engine(*, chosen: int | None = None, kind: str = "auto", length: int = 8192) -> Any:
    """The parts of an engine's configuration that its KV cache is chosen by."""
    model = SimpleNamespace(
        dtype=torch.bfloat16,
        max_model_len=length,
        get_num_layers=lambda parallel: 32,
        get_num_kv_heads=lambda parallel: 8 // parallel.world_size,
        get_head_size=lambda: 128,
    )
    cache = SimpleNamespace(kv_cache_memory_bytes=chosen, cache_dtype=kind, block_size=128)
    return SimpleNamespace(model_config=model, cache_config=cache, parallel_config=SimpleNamespace(world_size=2))


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> int:
    """Memory that is free, on a machine whose CPU computes."""
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: True)
    monkeypatch.setattr(cpu_cache, "_free_memory", lambda: 64 * 2**30)
    return 64 * 2**30


@pytest.mark.parametrize(("kind", "per_token"), [("auto", 65536), ("fp8", 32768)])
def test_a_cpu_engine_gets_a_cache_for_its_prompts(kind: str, per_token: int, free: int) -> None:
    config = engine(kind=kind)
    cpu_cache.choose(config, ["--enforce-eager"])
    assert config.cache_config.kv_cache_memory_bytes == cache_bytes(per_token, 8192 + 128, free=free // 2)


def test_the_users_own_choice_wins(free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for config, flags in (
        # As vLLM has put VLLM_CPU_KVCACHE_SPACE or --kv-cache-memory-bytes there.
        (engine(chosen=7), []),
        (engine(), ["--gpu-memory-utilization", "0.3"]),
        (engine(), ["--gpu_memory_utilization=0.3"]),
    ):
        before = config.cache_config.kv_cache_memory_bytes
        cpu_cache.choose(config, flags)
        assert config.cache_config.kv_cache_memory_bytes == before
    monkeypatch.setattr(type(current_platform), "is_cpu", lambda self: False)
    config = engine()
    cpu_cache.choose(config, [])
    assert config.cache_config.kv_cache_memory_bytes is None


def test_prompts_that_do_not_fit_are_refused_before_the_engine_starts(free: int) -> None:
    with pytest.raises(ValueError, match="take shorter prompts, or free some memory"):
        cpu_cache.choose(engine(length=2**20), [])


def test_calibration_measures_what_fits(plain: str, free: int, monkeypatch: pytest.MonkeyPatch) -> None:
    job: dict[str, Any] = {"model": plain, "trimix": {"layers": "1"}, "shortest": 256, "longest": 131072}
    # 2 layers, 2 heads of 16, keys and values of 4 bytes: 512 bytes a token.
    monkeypatch.setattr(cpu_cache, "_free_memory", lambda: 2 * (2**27 + 512 * 2000))
    flags = ["--skip-tokenizer-init", "--dtype", "float32"]
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    assert calibration.configure(**job, flags=flags, max_length=None)[1] == {"longest": 1999}
    assert calibration.configure(**job, flags=flags, max_length=4000)[1] == {"longest": 4000}
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    assert calibration.configure(**job, flags=flags, max_length=None)[1] == {"longest": 4095}
