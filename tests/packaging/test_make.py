"""The Makefile's variables, stamps and Ctrl-C, with a stand-in for the installed environment."""

from __future__ import annotations

import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vllm_trimix.measurement import hardware

ROOT = Path(__file__).parents[2]
BASE = ["--attention-backend", "TRIMIX", "--port"]
DEMO = ["--served-model-name", "demo", "--max-model-len", "40960"]

PRINT_ARGV = """
import json, os, sys
print("ARGV", json.dumps(sys.argv[1:]))
print("KVCACHE", os.environ.get("VLLM_CPU_KVCACHE_SPACE"))
"""
WAIT_FOR_CTRL_C = """
import signal, subprocess, sys
child = subprocess.Popen(["sleep", "600"])
try:
    # Ctrl-C may come before this has returned.
    print("READY", child.pid, flush=True)
    signal.pause()
except KeyboardInterrupt:
    child.terminate()
    child.wait()
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what make needs, installed as far as make can tell."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name)
    binaries = tmp_path / ".venv/bin"
    binaries.mkdir(parents=True)
    (binaries / "python").symlink_to(sys.executable)
    # The packages of the environment that runs the tests.
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", tmp_path / ".venv")
    (tmp_path / ".venv/lib").symlink_to(Path(sys.prefix) / "lib")
    (tmp_path / "build/demo-model").mkdir(parents=True)
    (tmp_path / "build/demo-model/config.json").touch()
    (tmp_path / ".venv/.installed").touch()
    return tmp_path


def _environment() -> dict[str, str]:
    dropped = (
        "MODEL",
        "PORT",
        "BACKEND",
        "TRIMIX_CONFIG",
        "SERVE_ARGS",
        "MAKEFLAGS",
        "MAKELEVEL",
        "VLLM_CPU_KVCACHE_SPACE",
    )
    return {name: value for name, value in os.environ.items() if name not in dropped} | {"CXX": sys.executable}


def _install_vllm(checkout: Path, body: str) -> None:
    script = checkout / ".venv/bin/vllm"
    script.write_text(f"#!{sys.executable}\n{body}")
    script.chmod(0o755)


@pytest.fixture
def serve(checkout: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    _install_vllm(checkout, PRINT_ARGV)

    def run(*variables: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "serve", *variables]
        return subprocess.run(command, cwd=checkout, env=_environment(), capture_output=True, text=True, timeout=30)

    return run


def _argv(result: subprocess.CompletedProcess[str]) -> list[str]:
    assert result.returncode == 0, result.stderr
    (line,) = [line for line in result.stdout.splitlines() if line.startswith("ARGV ")]
    argv = json.loads(line.removeprefix("ARGV "))
    assert isinstance(argv, list)
    return argv


def test_defaults_serve_the_demo_model(serve: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    result = serve()
    # Whether the demo model runs in fp32 is the processor's affair.
    assert [word for word in _argv(result) if word != "--dtype=float32"] == [
        *("serve", "build/demo-model", *BASE, "8000", *DEMO)
    ]
    assert "KVCACHE 2" in result.stdout


def test_the_demo_model_runs_in_fp32_where_bf16_is_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    serve = runpy.run_path(str(ROOT / "scripts" / "serve.py"))
    for flags, fast in (("fpu avx2", False), ("avx2 avx512f", True), ("avx2 amx_tile", True), ("neon", True)):
        monkeypatch.setattr(hardware, "cpuinfo", lambda flags=flags: f"flags\t\t: {flags}\n")
        assert serve["multiplies_bf16"]() is fast, flags
    # No such description: no x86 Linux.
    monkeypatch.setattr(hardware, "cpuinfo", lambda: "")
    assert serve["multiplies_bf16"]() is True

    def words(fast: bool, **variables: str) -> list[str]:
        found: list[str] = serve["serve_command"](variables, vllm="vllm", compiler=True, multiplies_bf16=fast)
        return found

    assert "--dtype=float32" not in words(True)
    assert "--dtype=float32" in words(False)
    # Another model is served as its users say; so is the demo model.
    assert "--dtype=float32" not in words(False, MODEL="some/model")
    assert words(False, SERVE_ARGS="--dtype bfloat16")[-2:] == ["--dtype", "bfloat16"]


def test_overrides_reach_vllm_unharmed(serve: Callable[..., subprocess.CompletedProcess[str]]) -> None:
    config = {"layers": "4, 6-7", "n_local": 256, "note": 'it\'s $HOME `x` \\ "q" #1'}
    result = serve(
        "MODEL=some/model name",
        "PORT=8123",
        f"TRIMIX_CONFIG={json.dumps(config)}",
        """SERVE_ARGS=--max-model-len 64 --override '{"a b": 1}'""",
    )
    argv = _argv(result)
    assert argv[:5] == ["serve", "some/model name", *BASE, "8123"][:5]
    assert argv[argv.index("--port") + 1] == "8123"
    assert json.loads(argv[argv.index("--additional-config") + 1]) == {"trimix": config}
    assert argv[-4:] == ["--max-model-len", "64", "--override", '{"a b": 1}']
    assert "--served-model-name" not in argv
    assert "KVCACHE None" in result.stdout


@pytest.mark.parametrize(
    ("variable", "message"),
    [
        ("TRIMIX_CONFIG={n_local: 256}", "TRIMIX_CONFIG: '{n_local: 256}' is not JSON"),
        ("TRIMIX_CONFIG=[16]", "is not a JSON object"),
        ('TRIMIX_CONFIG={"trimix": {"n_local": 256}}', "leave out the outer 'trimix'"),
        ("PORT=http", "PORT: 'http' is not a port (1-65535)"),
        ("SERVE_ARGS=--a 'b", "SERVE_ARGS: No closing quotation"),
    ],
    ids=["no-json", "no-object", "outer-key", "port", "open-quote"],
)
def test_bad_input_stops_before_vllm(
    serve: Callable[..., subprocess.CompletedProcess[str]], variable: str, message: str
) -> None:
    result = serve(variable)
    assert result.returncode != 0
    assert message in result.stderr
    assert "ARGV" not in result.stdout
    assert "Traceback" not in result.stderr


def test_without_a_compiler_nothing_is_compiled(checkout: Path) -> None:
    _install_vllm(checkout, PRINT_ARGV)
    if shutil.which("nvidia-smi"):
        pytest.skip("a machine with an NVIDIA driver needs no C++ compiler")
    environment = _environment() | {"CXX": "no-such-compiler"}
    result = subprocess.run(
        ["make", "serve"], cwd=checkout, env=environment, capture_output=True, text=True, timeout=30
    )
    assert "--enforce-eager" in _argv(result)


def test_dry_run_shows_no_shell_quoting(checkout: Path) -> None:
    command = ["make", "-n", "serve", """TRIMIX_CONFIG={"n_local": 256, "x": "it's"}"""]
    result = subprocess.run(command, cwd=checkout, env=_environment(), capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "exec .venv/bin/python scripts/serve.py"


PRINT_FETCH = """
import json, os
names = ("HOME", "PIP_CACHE_DIR", "PIP_CONFIG_FILE", "HF_HUB_OFFLINE")
print("FETCH", json.dumps({name: os.environ.get(name) for name in names}))
"""


def test_real_models_keeps_caches_in_the_checkout_and_pips_settings(checkout: Path, tmp_path: Path) -> None:
    (checkout / "benchmarks/real_models").mkdir(parents=True)
    (checkout / "benchmarks/real_models/fetch.py").write_text(PRINT_FETCH)
    home = tmp_path / "somebody"
    settings = home / ".config/pip/pip.conf"
    settings.parent.mkdir(parents=True)
    settings.touch()
    dropped = ("PIP_CACHE_DIR", "PIP_CONFIG_FILE", "XDG_CONFIG_HOME")
    environment = {name: value for name, value in _environment().items() if name not in dropped} | {"HOME": str(home)}

    def run(*arguments: str, **more: str) -> str:
        command = ["make", *arguments, "real-models"]
        result = subprocess.run(
            command, cwd=checkout, env=environment | more, capture_output=True, text=True, timeout=30, check=True
        )
        return result.stdout

    assert "scripts/install.sh dev" in run("-n"), "it needs what only install-dev brings"
    (checkout / ".venv/.installed-dev").touch()
    (line,) = run().splitlines()
    assert json.loads(line.removeprefix("FETCH ")) == {
        "HOME": str(checkout / "build/home"),
        "PIP_CACHE_DIR": str(checkout / "build/cache/pip"),
        "PIP_CONFIG_FILE": str(settings),
        "HF_HUB_OFFLINE": "1",
    }
    assert json.loads(run(PIP_CONFIG_FILE=os.devnull).removeprefix("FETCH "))["PIP_CONFIG_FILE"] == os.devnull


def test_second_install_does_nothing(checkout: Path) -> None:
    up_to_date = ["make", "--question", "install"]
    assert subprocess.run(up_to_date, cwd=checkout, env=_environment(), check=False).returncode == 0
    later = time.time() + 10
    os.utime(checkout / "requirements/constraints-cpu.txt", (later, later))
    assert subprocess.run(up_to_date, cwd=checkout, env=_environment(), check=False).returncode == 1


def test_ctrl_c_ends_the_server_and_its_children(checkout: Path) -> None:
    _install_vllm(checkout, WAIT_FOR_CTRL_C)
    with subprocess.Popen(
        ["make", "serve"], cwd=checkout, env=_environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        ready = next(line for line in process.stdout if line.startswith("READY"))
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=10)
    with pytest.raises(ProcessLookupError):
        os.kill(int(ready.split()[1]), 0)


def _install(checkout: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    shutil.rmtree(checkout / ".venv")
    environment = _environment() | variables
    return subprocess.run(
        ["make", "install"], cwd=checkout, env=environment, capture_output=True, text=True, timeout=60
    )


def test_install_says_which_index_is_missing(checkout: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    start = time.monotonic()
    result = _install(
        checkout,
        DEVICE="cpu",
        PYTHON=sys.executable,
        PIP_CONFIG_FILE=os.devnull,
        PIP_NO_INDEX="1",
        PIP_FIND_LINKS=str(empty),
    )
    assert result.returncode != 0
    assert "add PyTorch's CPU wheel index to pip's extra-index-url" in result.stderr
    assert "://" not in result.stderr
    assert time.monotonic() - start < 40, "a missing index must show within seconds (a venv is made first)"
    assert not (checkout / ".venv/.installed").exists()


def test_install_refuses_an_old_python(checkout: Path) -> None:
    old = checkout / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo "Python 3.8.1" && exit 0\nexit 1\n')
    old.chmod(0o755)
    result = _install(checkout, PYTHON=str(old))
    assert result.returncode != 0
    assert "Python 3.8.1 is too old: Python 3.11 or newer is needed" in result.stderr


def test_install_refuses_an_unknown_device(checkout: Path) -> None:
    result = _install(checkout, DEVICE="tpu", PYTHON=sys.executable)
    assert result.returncode != 0
    assert "DEVICE is 'tpu'; it must be auto, cpu or cuda" in result.stderr
