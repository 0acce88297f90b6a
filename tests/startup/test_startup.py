"""What stops a server from starting, and what only warns: real configurations, made as vLLM's front end makes them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import BertConfig, GemmaConfig, LlamaConfig, MistralConfig, Qwen2Config
from transformers.models.deepseek_v2.configuration_deepseek_v2 import DeepseekV2Config

from tests.tiers import Tier
from vllm_trimix.cli import doctor

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


@pytest.mark.parametrize("version", ["0.31.0", "0.34.0", "0.40.1", "mystery"])
def test_an_untested_vllm_is_refused_in_one_line(models: dict[str, str], tmp_path: Path, version: str) -> None:
    results, log = configure(
        tmp_path,
        {
            "trimix": ({"model": models["llama"], "attention_backend": "TRIMIX"}, {"layers": "1"}),
            "stock": ({"model": models["llama"], "attention_backend": "CPU_ATTN"}, None),
        },
        version,
    )
    assert results["trimix"] == (
        f"ConfigurationError: TRIMIX is tested with vLLM >= 0.32.0, < 0.34; this is vLLM {version}. "
        "Install a tested version, or choose another --attention-backend"
    )
    assert results["stock"] == {}
    assert "Traceback" not in log


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


def test_doctor(models: dict[str, str]) -> None:
    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from vllm_trimix.cli.main import main; exit(main())", "doctor", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, **env},
            check=False,
        )

    good = run(models["llama"], "--config", '{"layers": "2-3"}')
    assert good.returncode == 0, good.stdout + good.stderr
    assert "layers 2-3 of 4 run the triangle by kernel torch_cpu on CPU_ATTN" in good.stdout
    assert "survives pickling into a fresh process" in good.stdout
    assert "torch_cpu: error" in good.stdout
    kernel = r"ok +cpu kernel +(compiled, would run as \w+ for bf16|plain PyTorch \(.*was not built)"
    assert re.search(kernel, good.stdout)
    bad = run(models["llama"], "--config", '{"layers": "9"}', VLLM_PLUGINS="lora")
    assert bad.returncode == 1
    assert "'9' is outside this model's 4 layers" in bad.stdout
    assert "VLLM_PLUGINS='lora' leaves TRIMIX out" in bad.stdout


@pytest.mark.tier("J")
@pytest.mark.parametrize("allowed", [None, "trimix", "lora,trimix", "", "lora", "lora, trimix", "Trimix", "trimix2"])
def test_doctor_knows_whether_vllm_loads_the_plugin(
    allowed: str | None, monkeypatch: pytest.MonkeyPatch, tier: Tier
) -> None:
    """The same verdict as vLLM's own loader, and a hint that says what to change."""
    from vllm.plugins import DEFAULT_PLUGINS_GROUP, load_plugins_by_group

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    if allowed is not None:
        monkeypatch.setenv("VLLM_PLUGINS", allowed)
    if "trimix" in load_plugins_by_group(DEFAULT_PLUGINS_GROUP):
        assert "vllm_trimix.plugin:register" in doctor._plugin()
    else:
        hint = f"VLLM_PLUGINS={allowed!r} leaves TRIMIX out; add trimix to it or unset it"
        with pytest.raises(RuntimeError, match=re.escape(hint)):
            doctor._plugin()
    tier.case("doctor", allowed)


def test_doctor_on_an_installation_without_vllm(tmp_path: Path) -> None:
    """Every check says what is missing; no traceback."""
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('no vllm here')")
    code = "import sys; sys.path.insert(0, sys.argv[1]); from vllm_trimix.cli.main import main; exit(main(['doctor']))"
    process = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert process.returncode == 1
    assert "no vllm here" in process.stdout
    assert "Traceback" not in process.stderr
