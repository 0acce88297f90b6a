"""What stops a server from starting, and what only warns: real configurations, made as vLLM's front end makes them."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config

from vllm_trimix.backend import announce, compat
from vllm_trimix.cli import doctor
from vllm_trimix.config.resolve import resolve

SMALL: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}

MODELS: dict[str, tuple[Any, str, dict[str, Any]]] = {
    "llama": (LlamaConfig, "LlamaForCausalLM", {}),
    "mistral": (MistralConfig, "MistralForCausalLM", {"sliding_window": 512}),
    "qwen2": (Qwen2Config, "Qwen2ForCausalLM", {"use_sliding_window": False, "sliding_window": 512}),
    "gemma": (GemmaConfig, "GemmaForCausalLM", {}),
    "encoder": (BertConfig, "BertModel", {}),
    "mla": (
        DeepseekV2Config,
        "DeepseekV2ForCausalLM",
        {"kv_lora_rank": 16, "q_lora_rank": None, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16},
    ),
}

# (model, engine arguments, trimix entry, what the error or the log says; None: it starts)
CASES: dict[str, tuple[str, dict[str, Any], Any, str | None]] = {
    "fine": ("llama", {}, {"layers": "2-3"}, None),
    "empty set": ("llama", {}, {"layers": ""}, None),
    "qwen2 without its window": ("qwen2", {}, {"layers": "2-3"}, None),
    "typo": (
        "llama",
        {},
        {"n_last": 4, "layers": "1"},
        "unknown key 'n_last' in trimix config; did you mean 'last_n'?",
    ),
    "type": ("llama", {}, {"n_local": "big", "layers": "1"}, "trimix.n_local: 'big' is not valid"),
    "zero": ("llama", {}, {"n_local": 0, "layers": "1"}, "greater than or equal to 1"),
    "outside": ("llama", {}, {"starting_layer": 4}, "trimix.starting_layer: 4 is outside this model's 4 layers (0-3)"),
    "malformed": ("llama", {}, {"layers": "1;2"}, "'1;2' in '1;2' is not a layer or a range"),
    "no layers": ("llama", {}, None, "will not guess its layers"),
    "sliding": ("mistral", {}, {"layers": "2-3"}, "2-3 all stay stock in"),
    "mla": ("mla", {"trust_remote_code": False}, {"layers": "2-3"}, "does not support MLA models"),
    "pooling": ("llama", {"runner": "pooling"}, {"layers": "2-3"}, "does not support pooling models"),
    "encoder": ("encoder", {}, {"layers": "2-3"}, "does not support pooling models"),
    "gemma": ("gemma", {}, {"layers": "2-3"}, None),
    "kv dtype": (
        "llama",
        {"kv_cache_dtype": "int8_per_token_head"},
        {"layers": "2-3"},
        "does not support --kv-cache-dtype int8_per_token_head; choose one of auto",
    ),
    "dense backend": (
        "llama",
        {},
        {"layers": "2-3", "dense_backend": "FLASH_ATTN"},
        "trimix.dense_backend: 'FLASH_ATTN' does not run on this platform",
    ),
    "forged resolution": (
        "llama",
        {"additional_config": {"trimix_resolved": {"layers": "0-1", "source": "elsewhere"}}},
        None,
        "additional_config.trimix_resolved is internal",
    ),
    "another name": (
        "llama",
        {"additional_config": {"trianglemix": {"layers": "2-3"}}},
        None,
        "additional_config.trianglemix: TRIMIX reads its entry as 'trimix'; write {\"trimix\": {...}}",
    ),
    "no entry around it": (
        "llama",
        {"additional_config": {"starting_layer": 2, "n_local": 64}},
        None,
        'write them into it: {"trimix": {"starting_layer": 2, "n_local": 64}}',
    ),
    "beside the entry": ("llama", {"additional_config": {"layers": 1, "trimix": {"layers": "2-3"}}}, None, None),
    "context parallel": (
        "llama",
        {"decode_context_parallel_size": 2, "tensor_parallel_size": 4},
        {"layers": "2-3"},
        "--decode-context-parallel-size",
    ),
}

CHILD = """
import json, sys
import vllm
job = json.load(sys.stdin)
if job["version"]:
    vllm.__version__ = job["version"]
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum
results = {}
for name, (arguments, entry) in job["cases"].items():
    arguments = {"additional_config": {} if entry is None else {"trimix": entry}, **arguments}
    try:
        config = EngineArgs(skip_tokenizer_init=True, **arguments).create_engine_config()
        results[name] = config.additional_config.get("trimix_resolved", {})
    except Exception as error:
        results[name] = f"{type(error).__name__}: {error}"
try:
    from vllm import SamplingParams
    SamplingParams(extra_args={"trimix": "nonsense"})
    results["nonsense without a TRIMIX engine"] = "ignored"
except Exception as error:
    results["nonsense without a TRIMIX engine"] = repr(error)
json.dump(results, open(sys.argv[1], "w"))
"""


def configure(tmp_path: Path, cases: dict[str, Any], version: str | None = None) -> tuple[dict[str, Any], str]:
    """Makes one engine configuration per case in a fresh process; returns results and the log."""
    out = tmp_path / "results.json"
    job = {"cases": cases, "version": version}
    process = subprocess.run(
        [sys.executable, "-c", CHILD, str(out)], input=json.dumps(job), capture_output=True, text=True, check=False
    )
    log = process.stdout + process.stderr
    assert process.returncode == 0, log[-4000:]
    return json.loads(out.read_text()), log


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("models")
    for name, (config, architecture, extra) in MODELS.items():
        config(**{**SMALL, **extra}, architectures=[architecture]).save_pretrained(root / name)
    return {name: str(root / name) for name in MODELS}


@pytest.fixture(scope="module")
def configured(models: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    cases = {
        name: ({"model": models[model], "attention_backend": "TRIMIX", **arguments}, entry)
        for name, (model, arguments, entry, _) in CASES.items()
    }
    return configure(tmp_path_factory.mktemp("out"), cases)[0]


@pytest.mark.parametrize("name", CASES)
def test_configurations(configured: dict[str, Any], name: str) -> None:
    expected = CASES[name][3]
    result = configured[name]
    if expected is None:
        assert isinstance(result, dict), result
        assert result["num_layers"] == 4
        assert result["layers"] == ([] if name == "empty set" else [2, 3])
    else:
        assert isinstance(result, str), "it started"
        assert result.startswith("ConfigurationError: ")
        assert expected in result


def test_other_backends_are_untouched(models: dict[str, str], tmp_path: Path) -> None:
    results, log = configure(
        tmp_path, {"stock": ({"model": models["llama"], "attention_backend": "CPU_ATTN"}, {"n_last": "nonsense"})}
    )
    assert results == {"stock": {}, "nonsense without a TRIMIX engine": "ignored"}
    assert "the attention backend is not TRIMIX; it is ignored" in log


SOURCE = "0.1.dev1+g0a1b2c3d4"
SWITCH = "TRIMIX_ALLOW_UNTESTED_VLLM"


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.40.1", "mystery", SOURCE])
def test_an_untested_vllm_is_refused_in_one_line(models: dict[str, str], tmp_path: Path, version: str) -> None:
    results, log = configure(
        tmp_path,
        {
            "trimix": ({"model": models["llama"], "attention_backend": "TRIMIX"}, {"layers": "1"}),
            "stock": ({"model": models["llama"], "attention_backend": "CPU_ATTN"}, None),
        },
        version,
    )
    named = ", a build from source without git tags, which has no version of its own" if version == SOURCE else ""
    assert results["trimix"] == (
        f"ConfigurationError: TRIMIX is tested with vLLM >= 0.32.0, < 0.34; this is vLLM {version}{named}. "
        "Install a tested version, choose another --attention-backend, or try it at your own risk with the environment "
        f"variable {SWITCH}=1: compare answers with the opt-out before you rely on them"
    )
    assert results["stock"] == {}
    assert "Traceback" not in log


@pytest.mark.parametrize("version", ["0.34.0", SOURCE])
def test_an_untested_vllm_can_be_tried(
    models: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    case = {"trimix": ({"model": models["llama"], "attention_backend": "TRIMIX"}, {"layers": "1"})}
    monkeypatch.setenv(SWITCH, "1")
    results, _ = configure(tmp_path, case, version)
    assert results["trimix"]["layers"] == [1]
    monkeypatch.setenv(SWITCH, "yes")
    results, _ = configure(tmp_path, case, version)
    assert results["trimix"] == (
        f"ConfigurationError: {SWITCH}: 'yes' is not valid: write 1 to try an untested vLLM, or unset it"
    )


def test_what_an_untested_vllm_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """The start-up line ends with it, and ``doctor`` calls it a failure."""
    resolved = resolve({"layers": "1"}, model="m", num_layers=2)
    line = functools.partial(announce.start_line, resolved, dense="CPU_ATTN", kernel="torch_cpu", stock={})
    assert "vllm=" not in line()
    monkeypatch.setattr(compat, "vllm_version", lambda: "0.35.1")
    monkeypatch.setenv(SWITCH, "1")
    assert line().endswith(" shallow=dense vllm=0.35.1:untested")
    with pytest.raises(RuntimeError, match=rf"this is vLLM 0\.35\.1; {SWITCH}=1 lets it be tried"):
        doctor._vllm()


def test_python_code_may_name_the_backend_before_an_engine_is_made() -> None:
    """vLLM loads general plugins with an engine's arguments only; its own configuration objects come before."""
    code = (
        "from vllm.config import AttentionConfig\n"
        "from vllm.platforms import current_platform\n"
        "kinds = AttentionConfig(backend_per_kind={'full_attention': 'TRIMIX'}).backend_per_kind\n"
        "backend = AttentionConfig(backend='TRIMIX').backend\n"
        "print(backend.name, kinds['full_attention'].name, type(current_platform).__name__)"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr[-2000:]
    backend, kind, platform = process.stdout.split()[-3:]
    assert (backend, kind) == ("TRIMIX", "TRIMIX")
    assert platform in ("CpuPlatform", "CudaPlatform", "NvmlCudaPlatform"), "the plugin is no platform"


def test_serve_stops_in_the_front_end(models: dict[str, str]) -> None:
    """No worker is started for a configuration that can't run, and the reason is the last line."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", models["llama"], "--attention-backend=TRIMIX"]
    process = subprocess.run(
        [*command, "--skip-tokenizer-init", '--additional-config={"trimix": {"starting_layer": 7}}'],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    log = process.stdout + process.stderr
    assert process.returncode != 0
    assert "trimix.starting_layer: 7 is outside this model's 4 layers (0-3)" in log.strip().splitlines()[-1]
    assert "EngineCore" not in log
