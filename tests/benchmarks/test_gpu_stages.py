"""The GPU run's stages: their registry, what run_all.sh refuses, and all of them at toy size."""

from __future__ import annotations

import importlib
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from benchmarks.gpu.report import load
from benchmarks.gpu.running.source import ROOT as SOURCE_ROOT
from benchmarks.gpu.stage import STAGE_LIMIT
from benchmarks.gpu.stages import STAGES
from tests.benchmarks.reports import make_report

ROOT = Path(__file__).parents[2]
RUN_ALL = ROOT / "benchmarks" / "gpu" / "run_all.sh"


def test_the_registry() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for stage in STAGES:
        assert stage.seconds <= STAGE_LIMIT
        module, _, name = stage.function.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), stage.name
        assert stage.toy.keys() <= stage.settings.keys(), f"{stage.name}: a rehearsal sets what the stage doesn't know"
    # An interrupted budget must have bought the most valuable first.
    assert [stage.name for stage in STAGES[:2]] == ["smoke", "kernel_reference"]


def run_all(*arguments: str, script: Path = RUN_ALL, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(script), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def test_what_run_all_refuses(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    venv.create(tmp_path / "bare", with_pip=False)
    bare = str(tmp_path / "bare" / "bin" / "python")
    # A packed vLLM in this checkout would stand in for the one that the bare interpreter lacks.
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT / "benchmarks", copy / "benchmarks", ignore=shutil.ignore_patterns("results", "__pycache__"))
    (copy / "vllm_trimix").symlink_to(ROOT / "vllm_trimix")
    for arguments, env, message in (
        (["--archive", str(tmp_path / "gone")], {}, f"--archive: no folder '{tmp_path}/gone'"),
        (["--archive", str(tmp_path / "empty")], {}, f"'{tmp_path}/empty' has no unpack.sh, inside or beside it"),
        ([], {"PYTHON": "python0.1"}, "no interpreter 'python0.1'; name one: PYTHON=/path/to/python3"),
        (["--toy"], {"PYTHON": bare}, f"{bare} can't import pydantic"),
    ):
        found = run_all(*arguments, script=copy / RUN_ALL.relative_to(ROOT), TMPDIR=str(tmp_path), **env)
        assert found.returncode == 2, found.stderr
        assert found.stderr.startswith("run_all.sh: error: ")
        assert message in found.stderr
        assert found.stderr.count("\n") == 1


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="vLLM brings torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = run_all("--output", str(tmp_path / "out"))
    assert found.returncode == 2
    assert "no CUDA device" in found.stderr
    assert "--toy" in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("beside", [False, True], ids=["inside", "beside"])
def test_an_archive_is_unpacked_and_comes_before_what_is_installed(tmp_path: Path, beside: bool) -> None:
    pytest.importorskip("vllm", reason="the interpreter must have what the archive lacks")
    archive = tmp_path / "packed" / "vp"
    archive.mkdir(parents=True)
    # Python runs sitecustomize from its path at start: a trace in every process.
    sampler = "__import__('os').environ['VLLM_USE_FLASHINFER_SAMPLER']"
    (archive / "part00").write_text(f"open({str(tmp_path / 'trace')!r}, 'a').write({sampler})\n")
    script = 'mkdir -p "$2/bin"; cp "$1/part00" "$2/sitecustomize.py"; touch "$2/.complete"; echo unpacked\n'
    (archive.parent if beside else archive).joinpath("unpack.sh").write_text(script)
    found = run_all("--archive", str(archive), "--toy", "--dry-run", "--only=smoke", TMPDIR=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert "unpacked" in found.stdout
    assert "would run smoke" in found.stdout
    assert set((tmp_path / "trace").read_text()) == {"0"}, "the archive holds no FlashInfer"
    (archive.parent if beside else archive).joinpath("unpack.sh").write_text("exit 0\n")
    (next(tmp_path.glob("trimix-gpu-*")) / "site" / ".complete").unlink()
    found = run_all("--archive", str(archive), "--toy", "--dry-run", TMPDIR=str(tmp_path))
    assert found.returncode == 2
    assert "is not complete: parts are missing" in found.stderr


def test_a_figure_never_overwrites_the_verdict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="figure: seconds, status is a field of every result"):
        make_report(tmp_path, "smoke").figure(seconds=1, status="passed")


def test_one_real_stage_and_its_resumption(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="stages run vLLM")
    pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")
    arguments = ("--toy", "--only=kernel_reference", f"--output={tmp_path / 'out'}")
    found = run_all(*arguments)
    assert found.returncode == 0, found.stdout + found.stderr
    result = load(tmp_path / "out" / "kernel_reference.json")
    assert result is not None
    assert (result["status"], result["cases"], result["cases_skipped"]) == ("passed", 8, [])
    assert result["environment"]["versions"]["vllm"]


KINDS = (
    "smoke",
    "engine_v2_eager",
    "circuit",
    "kernels",
    # The second finds its servers' rounds measured by the first.
    "ttft_128k,ttft_32k_64k,decode",
    "fp8_kv",
    "sync_debug",
    "breakdown",
    "rows_gate",
    "rows_circuit",
    "real_llama_niah",
    "real_llama_probe",
)
"""One stage of each kind: others differ in settings, which the toy size replaces."""


def test_every_kind_of_stage_is_rehearsed() -> None:
    stages = {stage.name: stage.function for stage in STAGES}
    rehearsed = {stages[name] for names in KINDS for name in names.split(",")}
    assert rehearsed | {stages["kernel_reference"]} == set(stages.values())


@pytest.mark.slow
@pytest.mark.parametrize("names", KINDS)
def test_a_stage_at_toy_size(tmp_path: Path, names: str) -> None:
    pytest.importorskip("vllm", reason="stages run vLLM")
    found = run_all("--toy", f"--only={names}", "--output", str(tmp_path / "out"))
    results = {name: load(tmp_path / "out" / f"{name}.json") for name in names.split(",")}
    assert all(results.values()), found.stdout + found.stderr
    verdicts = {name: (result["status"], result["seen"]) for name, result in results.items() if result}
    if verdicts.get(names) == ("skipped", "vLLM keeps fp8 KV on CPUs with AVX-512 or AMX only"):
        pytest.skip("vLLM keeps fp8 KV on CPUs with AVX-512 or AMX only")
    assert [name for name, (status, _) in verdicts.items() if status != "passed"] == [], verdicts
    assert found.returncode == 0
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert all(f"| {name} | passed |" in summary for name in results)


def test_run_all_is_executable() -> None:
    assert os.access(RUN_ALL, os.X_OK)
    assert SOURCE_ROOT == ROOT
