"""With another backend selected the plugin leaves vLLM as it is: function by function, object by object, bit by bit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.models import save_tiny_llama
from tests.tiers import Tier

ROOT = Path(__file__).parents[2]
PROMPTS = [[7 + 13 * index % 240 for index in range(700)], [5, 6, 7], [9] * 130]
TRIMIX = {"trimix": {"starting_layer": 1, "n_init": 4, "n_local": 16, "last_n": 8, "min_prompt_len": 0}}

# What registration can't do without: the name, and the two places where it is chosen. All three are asked at start
# only, never while requests run. `vllm_trimix.backend.compat` says why each is needed.
REGISTRATION = {
    "vllm.platforms.cpu.CpuPlatform.check_and_update_config",
    "vllm.platforms.cpu.CpuPlatform.get_attn_backend_cls",
    "vllm.v1.attention.backends.registry.AttentionBackendEnum.TRIMIX",
}
SELECTED = {
    "vllm.entrypoints.openai.chat_completion.protocol.ChatCompletionRequest.to_beam_search_params",
    "vllm.entrypoints.openai.completion.protocol.CompletionRequest.to_beam_search_params",
    "vllm.sampling_params.SamplingParams._verify_args",
    "vllm.v1.engine.input_processor.InputProcessor.__init__",
    "vllm.v1.engine.input_processor.InputProcessor.process_inputs",
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner.execute_model",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner.execute_model",
}
IMPORTED = [
    "vllm_trimix",
    "vllm_trimix.backend",
    "vllm_trimix.backend.compat",
    "vllm_trimix.backend.names",
    "vllm_trimix.backend.registration",
    "vllm_trimix.plugin",
]
# Classes that every request passes; the sweep covers them only if it covers what it says.
HOT = (
    "vllm.model_executor.layers.attention.attention.Attention.forward",
    "vllm.platforms.cpu.CpuPlatform.get_device_name",
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionBackendImpl.forward",
    "vllm.v1.attention.backends.cpu_attn.CPUAttentionMetadataBuilder.build",
    "vllm.v1.core.kv_cache_manager.KVCacheManager.allocate_slots",
    "vllm.v1.core.sched.scheduler.Scheduler.schedule",
    "vllm.v1.engine.async_llm.AsyncLLM.generate",
    "vllm.v1.engine.core.EngineCore.step",
    "vllm.v1.engine.output_processor.OutputProcessor.process_outputs",
    "vllm.v1.worker.cpu_model_runner.CPUModelRunner.load_model",
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner._prepare_inputs",
    *SELECTED,
)


def process(
    tmp_path: Path, model: Path, *, plugins: str, backend: str = "CPU_ATTN", serves: bool = True
) -> dict[str, Any]:
    """What a process finds in itself: started with these plugins, asked for this backend."""
    out = tmp_path / f"{plugins}-{backend}.json"
    engine = {
        "model": str(model),
        "attention_backend": backend,
        "max_model_len": 1024,
        "additional_config": TRIMIX if backend == "TRIMIX" else {},
    }
    child = subprocess.run(
        [sys.executable, "-m", "tests.untouched.child", str(out)],
        input=json.dumps({"engine": engine, "prompts": PROMPTS if serves else []}),
        env={**os.environ, "VLLM_PLUGINS": plugins},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=600,
        check=False,
    )
    log = child.stdout + child.stderr
    assert child.returncode == 0, log[-4000:]
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def differences(one: dict[str, Any], other: dict[str, Any]) -> set[str]:
    """Names whose values differ, or that only one of them has."""
    return {name for name in one.keys() | other.keys() if one.get(name) != other.get(name)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", num_heads=4, num_kv_heads=2)


def assert_the_same_vllm(without: dict[str, Any], with_plugin: dict[str, Any], tier: Tier) -> None:
    assert without["ours"] == [], "the process that should know no plugin has loaded it: it compares nothing"
    assert with_plugin["ours"] == IMPORTED
    assert differences(without["vllm"], with_plugin["vllm"]) == REGISTRATION
    assert [name for name in HOT if name not in without["vllm"]] == []
    assert with_plugin["threads"] == without["threads"]
    assert with_plugin["libraries"] == without["libraries"]
    for name in without["modules"]:
        if name.split(".", 1)[0] == "vllm":
            tier.case("module", name)
    # Our own, and nothing that they would have pulled in.
    assert set(with_plugin["modules"]) - set(without["modules"]) == set(IMPORTED)


@pytest.mark.tier("J")
def test_a_configured_process_is_the_same(model: Path, tmp_path: Path, tier: Tier) -> None:
    """Registered, the configuration made by vLLM's own checks, every module of the hot path loaded."""
    without = process(tmp_path, model, plugins="", serves=False)
    with_plugin = process(tmp_path, model, plugins="trimix", serves=False)
    assert_the_same_vllm(without, with_plugin, tier)


@pytest.mark.slow
@pytest.mark.tier("J")
def test_an_engine_is_the_same_and_answers_the_same(model: Path, tmp_path: Path, tier: Tier) -> None:
    without = process(tmp_path, model, plugins="")
    with_plugin = process(tmp_path, model, plugins="trimix")
    assert_the_same_vllm(without, with_plugin, tier)
    assert len(without["objects"]) > 15
    assert with_plugin["objects"] == without["objects"]
    for name in without["objects"]:
        tier.case("object", name)
    assert with_plugin["answers"] == without["answers"], "not bit by bit"
    for number, answer in enumerate(without["answers"]):
        assert len(answer) == 8
        tier.case("answer", number)

    # With TRIMIX selected the same comparison must see every patch, or what it didn't see above means nothing.
    selected = process(tmp_path, model, plugins="trimix", backend="TRIMIX")
    assert differences(without["vllm"], selected["vllm"]) == REGISTRATION | SELECTED
    changed = differences(without["objects"], selected["objects"])
    assert {name.split()[0] for name in changed} == {"implementation", "builder"}
    assert "trimix-stats" in selected["threads"]
    assert selected["answers"] != without["answers"], "the mask changed nothing"
