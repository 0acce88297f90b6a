"""``vllm-trimix doctor``: its own arguments first, then the installation, then what a server would run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from tests.tiers import Tier
from vllm_trimix.cli import doctor
from vllm_trimix.cli.main import main
from vllm_trimix.cli.model_folder import check_model

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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("llama")
    LlamaConfig(**SMALL, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    return str(folder)


def test_doctor(llama: str) -> None:
    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-c", "from vllm_trimix.cli.main import main; exit(main())", "doctor", *arguments],
            capture_output=True,
            text=True,
            env={**os.environ, **env},
            check=False,
        )

    good = run(llama, "--config", '{"layers": "2-3"}')
    assert good.returncode == 0, good.stdout + good.stderr
    assert "layers 2-3 of 4 run the triangle by kernel torch_cpu on CPU_ATTN" in good.stdout
    assert "survives pickling into a fresh process" in good.stdout
    assert "torch_cpu: error" in good.stdout
    kernel = r"ok +cpu kernel +(compiled, would run as \w+ for bf16|plain PyTorch \(.*was not built)"
    assert re.search(kernel, good.stdout)
    bad = run(llama, "--config", '{"layers": "9"}', VLLM_PLUGINS="lora")
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


# Arguments after MODEL, and what the only line of the refusal says.
WRONG: dict[str, tuple[list[str], str]] = {
    "no JSON": (["--config", "{layers: 1}"], "--config: '{layers: 1}' is not JSON"),
    "typo": (["--config", '{"layes": "1"}'], "unknown key 'layes' in trimix config; did you mean 'layers'?"),
    "typo in a server's form": (["--config", '{"trimix": {"n_last": 4}}'], "did you mean 'last_n'?"),
    "typo in what was pasted": (
        ["--", "--additional-config", '{"trimix": {"n_last": 4}, "other": {}}'],
        "did you mean 'last_n'?",
    ),
    "both": (
        ["--config", '{"layers": "1"}', "--", "--additional-config={}"],
        "--config and --additional-config are two spellings of one setting; keep one",
    ),
    "no object": (["--config", "3"], "trimix: expected a JSON object"),
    "server flag": (["--port", "8000"], "unrecognized arguments: --port 8000; engine flags go after --"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_fail_at_once(name: str, llama: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, said = WRONG[name]
    started = time.monotonic()
    try:
        status = main(["doctor", llama, *arguments])
    except SystemExit as error:
        status = int(str(error.code))
    assert status == 2
    assert time.monotonic() - started < 2, "before the checks, which take ten seconds"
    captured = capsys.readouterr()
    assert said in captured.err.strip().splitlines()[-1]
    assert captured.out == ""


@pytest.mark.parametrize("arguments", [["--config", '{"layers": "1"}'], ["--", "--dtype", "float32"]])
def test_what_is_about_a_model_needs_one(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", *arguments]) == 2
    assert "--config and engine flags need a MODEL" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral" / "params.json").write_text("{}")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for model, said in {
        "/nowhere/model": "there is no folder '/nowhere/model'",
        "./model": "there is no folder './model'",
        "a/b/c": "there is no folder 'a/b/c'",
        str(tmp_path / "empty"): "holds no config.json or params.json",
        "nobody/no-such-model": "'nobody/no-such-model' is neither a folder here nor in the hub's cache ",
    }.items():
        with pytest.raises(ValueError, match=re.escape(said)):
            check_model(model)
    check_model("mistral")
    # With a network the hub is asked, later.
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    check_model("nobody/no-such-model")


PASTED = ["--", "--attention-backend", "TRIMIX", "--additional-config", '{"trimix": {"layers": "1-3"}}']


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param(["--config", '{"trimix": {"layers": "1-3"}}', "--"], id="server's form"),
        pytest.param(PASTED, id="pasted from a server's command"),
    ],
)
def test_what_a_server_would_run_with_these_flags(arguments: list[str], llama: str) -> None:
    process = subprocess.run(
        [
            *[sys.executable, "-m", "vllm_trimix.cli.main", "doctor", llama, *arguments],
            *["--kv-cache-dtype", "fp8"],
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    verdict = next(line for line in process.stdout.splitlines() if line.startswith("FAILED"))
    assert "NOTHING IS SPARSE: all chosen layers stay stock (1-3:fp8_kv_on_cpu)" in verdict
    assert "leave --kv-cache-dtype unset" in verdict
    assert "INFO" not in process.stdout, "vLLM's own log is not the answer"
