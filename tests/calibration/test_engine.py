"""A real engine, measured by the command as users run it, and what a server would make of the overlay."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cpu import fast_dtype
from vllm_trimix.cli.main import main
from vllm_trimix.config.entry import DEFAULT_MIN_PROMPT_LEN
from vllm_trimix.config.resolve import resolve

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "vllm_trimix.cli.main", "calibrate"]
FLAGS = ["--load-format", "dummy", "--enforce-eager", "--dtype", fast_dtype()]
# Sparse enough for the triangle to win at 2048 tokens on any machine.
TRIMIX = {"starting_layer": 1, "n_init": 4, "n_local": 64, "last_n": 16, "prompt_logprobs": "triangle"}
SHALLOW = {"shallow": {"pattern": "a_shape", "n_init": 4, "n_local": 64}}
RESOLVED = """
import json, sys
from vllm_trimix.backend.preview import preview
model, entry = sys.argv[1:]
print(preview(model, {"trimix": json.loads(entry)}, []).resolved.model_dump_json())
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "bench-8l"
    assert main(["make-bench-model", str(directory), "--shape", "bench-8l"]) == 0
    return directory


def environment(folder: Path) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    # vLLM's sockets stay in the usual folder: their paths may have 107 characters, and a test's own folder is deep.
    sockets = os.environ.get("VLLM_RPC_BASE_PATH", tempfile.gettempdir())
    changed = {"VLLM_CPU_KVCACHE_SPACE": "1", "PYTHONPATH": path, "TMPDIR": str(folder), "VLLM_RPC_BASE_PATH": sockets}
    return os.environ | changed


def test_measures_and_writes_what_a_server_then_runs(model: Path, tmp_path: Path) -> None:
    short = tmp_path / "tmp"
    short.mkdir()
    entry = json.dumps(TRIMIX | SHALLOW)
    arguments = [str(model), "--trimix", entry, "--max-length", "2048", "--repeats", "3", "--", *FLAGS]
    process = subprocess.run(
        [*COMMAND, *arguments], cwd=tmp_path, env=environment(short), capture_output=True, text=True, check=False
    )
    assert process.returncode == 0, process.stdout + process.stderr
    overlay = json.loads((tmp_path / "trimix-bench-8l.json").read_text())
    samples = overlay["provenance"]["samples"]
    assert {512, 1024, 2048} <= {sample["length"] for sample in samples}
    assert all(value > 0 for sample in samples for value in (*sample["dense_s"], *sample["triangle_s"]))
    assert overlay["min_prompt_len"] in {sample["length"] for sample in samples}
    assert overlay["provenance"]["ran"].startswith("layers=1-7 of=8 pattern=triangle n_init=4 n_local=64 last_n=16 ")
    assert "shallow=a_shape:layers:0:min_seq_len:0:last_n:16:" in overlay["provenance"]["ran"]
    dynamic = overlay["provenance"]["dynamic_samples"]
    assert {512, 1024, 2048} <= {sample["length"] for sample in dynamic}
    assert all(value > 0 for sample in dynamic for value in (*sample["triangle_s"], *sample["dynamic_s"]))
    # A fixed window: the longer the prompt, the smaller its share.
    densities = [sample["density"] for sample in sorted(dynamic, key=lambda sample: sample["length"])]
    assert densities == sorted(densities, reverse=True)
    assert 0 < densities[-1] < 0.2
    # Which one depends on the machine: the pattern's one layer of eight saves little.
    lengths = {sample["length"] for sample in dynamic}
    assert overlay["shallow"] == "dense" or overlay["shallow"]["min_seq_len"] in lengths
    assert overlay["provenance"]["engine"]["dtype"] == fast_dtype()
    assert list(short.glob("vllm-trimix-*")) == []

    command = shlex.split(process.stdout.splitlines()[-1])
    assert command[:3] == ["vllm", "serve", str(model)]
    written: dict[str, Any] = json.loads(command[command.index("--additional-config") + 1])["trimix"]
    assert written["prompt_logprobs"] == "triangle"
    expected = resolve(written, model=str(model), num_layers=8)
    assert expected.min_prompt_len == overlay["min_prompt_len"] != DEFAULT_MIN_PROMPT_LEN
    assert (expected.layers, expected.n_init, expected.n_local, expected.last_n) == (tuple(range(1, 8)), 4, 64, 16)

    served = subprocess.run(
        [sys.executable, "-c", RESOLVED, str(model), json.dumps(written)],
        env=environment(short),
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(served.stdout.splitlines()[-1]) == expected.model_dump(mode="json")


@pytest.mark.slow
def test_ctrl_c_while_it_measures_ends_every_process(model: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*COMMAND, str(model), "--trimix", json.dumps(TRIMIX), "--output", str(tmp_path / "o.json"), "--", *FLAGS],
        env=environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        assert process.stdout is not None
        while not process.stdout.readline().lstrip().startswith("512"):
            assert process.poll() is None
        (engine,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        assert len(session(engine)) >= 2, "no engine core to end"
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        time.sleep(0.2)
        assert session(engine) == []
        assert not (tmp_path / "o.json").exists()
    finally:
        process.kill()
        process.wait()


def session(leader: str) -> list[str]:
    """Processes of a session that live."""
    listed = subprocess.run(["ps", "-s", leader, "-o", "pid=,stat="], capture_output=True, text=True, check=False)
    return [line for line in listed.stdout.splitlines() if line.split()[1][0] != "Z"]


def test_the_model_and_the_flags_are_checked_by_vllm(model: Path, tmp_path: Path) -> None:
    process = subprocess.run(
        [*COMMAND, str(model), "--max-length", "200000", "--output", str(tmp_path / "o.json")],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 2
    message = "--max-length: 200000 prompt tokens and 1 generated exceed the 131072 tokens of "
    assert f"error: {message}" in process.stderr
    assert "choose at most 131071" in process.stderr
    assert len(process.stderr.splitlines()) == 2
