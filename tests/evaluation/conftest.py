"""A small circuit model and the server that speaks for it, one for all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec

ENGINE_FLAGS = ["--", "--enforce-eager", "--gpu-memory-utilization", "0.3"]


@pytest.fixture(scope="session")
def circuit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Looks records up in layer 1, which alone needs the middle of the prompt."""
    path = tmp_path_factory.mktemp("evaluation") / "circuit"
    make_demo_model(path, CircuitSpec(layers=3, lookup_layer=1, answer_layer=2, heads=2, kv_heads=1))
    return path


@pytest.fixture(autouse=True)
def _little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
