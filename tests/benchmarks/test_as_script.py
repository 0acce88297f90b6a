"""Benchmarks started by their files, from any folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpu import fast_dtype

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SCRIPTS = sorted(BENCHMARKS.glob("benchmark_*.py"))


def start(file: Path, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Started as a user would who has neither the checkout on the path nor a number of threads set."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "OMP_NUM_THREADS")}
    command = [sys.executable, str(file), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: file.stem)
def test_a_file_starts_from_another_folder(file: Path, tmp_path: Path) -> None:
    found = start(file, "--help", folder=tmp_path)
    assert found.returncode == 0, found.stderr
    assert found.stdout.startswith("usage: ")
    assert file.stem in found.stdout.splitlines()[0]
    assert list(tmp_path.iterdir()) == []


def test_a_file_measures(tmp_path: Path) -> None:
    arguments = ["--output=out", "--device=cpu", "--lengths=300", "--repeats=1", f"--dtype={fast_dtype()}"]
    found = start(BENCHMARKS / "benchmark_kernels.py", *arguments, "--contenders=vllm_cpu,trimix_cpu", folder=tmp_path)
    assert found.returncode == 0, found.stderr
    rows = json.loads((tmp_path / "out" / "kernels.json").read_text())["rows"]
    assert {row["contender"] for row in rows if row["status"] == "ok"} == {"vllm_cpu", "trimix_cpu"}


START = """
if not __package__:
    import as_module

    as_module.run(__file__)

import importlib.util
import json
import sys

from benchmarks import kernels

bare = [name for name in ("kernels", "benchmark_x") if importlib.util.find_spec(name)]
print(json.dumps([__name__, __spec__.name, sys.argv, bare, kernels.OURS, sys.modules["__main__"].__spec__.name]))
if sys.argv[1:]:
    sys.exit(int(sys.argv[1]))
"""


@pytest.mark.parametrize("status", [0, 3])
def test_it_goes_on_as_its_module_and_hides_no_other(tmp_path: Path, status: int) -> None:
    """Once only, with its arguments and its exit status; modules beside it have no bare names."""
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    shutil.copy(BENCHMARKS / "as_module.py", folder)
    for name, text in (("__init__", ""), ("kernels", "OURS = True"), ("benchmark_x", START)):
        (folder / f"{name}.py").write_text(text)
    arguments = [str(status)] if status else []
    found = start(folder / "benchmark_x.py", *arguments, folder=Path("/"))
    assert found.returncode == status, found.stderr
    name = "benchmarks.benchmark_x"
    assert [json.loads(line) for line in found.stdout.splitlines()] == [
        ["__main__", name, [str(folder / "benchmark_x.py"), *arguments], [], True, name]
    ]
