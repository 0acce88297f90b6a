"""The `vllm-trimix` command itself."""

from __future__ import annotations

import argparse
import importlib
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from vllm_trimix import __version__
from vllm_trimix.cli.main import COMMANDS, build_parser, main

ROOT = Path(__file__).parents[2]


def test_help_is_fast_and_lists_every_command() -> None:
    command = [sys.executable, "-m", "vllm_trimix.cli.main", "--help"]
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        seconds.append(time.perf_counter() - start)
    assert all(name in result.stdout for name in COMMANDS)
    assert min(seconds) < 0.3


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_exists_and_is_light(name: str) -> None:
    module = COMMANDS[name][0]
    heavy = {"torch", "vllm", "triton", "transformers", "numpy"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
    parser, loaded = build_parser(name)
    assert loaded is importlib.import_module(module)
    with pytest.raises(SystemExit) as stopped:
        parser.parse_args([name, "--help"])
    assert stopped.value.code == 0


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.strip() == f"vllm-trimix {__version__}"


@pytest.mark.parametrize("argv", [[], ["no-such-command"]], ids=["none", "unknown"])
def test_bad_command_lines_exit_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == 2
    assert "vllm-trimix: error:" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("--tokens: 3 is too few"), "--tokens: 3 is too few"),
        (FileNotFoundError(2, "No such file or directory", "x.json"), "[Errno 2] No such file or directory: 'x.json'"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), "needs the package 'torch'"),
    ],
    ids=["value", "os", "companion"],
)
def test_expected_errors_are_one_line(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise error

    monkeypatch.setattr("vllm_trimix.cli.fix_vllm_cpu.run", fail)
    assert main(["fix-vllm-cpu"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("vllm-trimix: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_a_defect_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(args: argparse.Namespace) -> int:
        raise TypeError("ours")

    monkeypatch.setattr("vllm_trimix.cli.fix_vllm_cpu.run", fail)
    with pytest.raises(TypeError, match="ours"):
        main(["fix-vllm-cpu"])


def test_demo_without_a_server_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    assert main(["demo", "--port", str(port)]) == 2
    assert "start one with `make serve`" in capsys.readouterr().err
