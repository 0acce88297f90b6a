"""What `pip install .` puts on a machine."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("building a wheel without network needs setuptools 77 in this environment (extra dev)")
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "vllm_trimix", source / "vllm_trimix", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", str(out), str(source)], check=True)
    (path,) = out.glob("*.whl")
    assert path.name.endswith("-py3-none-any.whl"), "pure Python must be enough"
    return zipfile.ZipFile(path)


def _metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_every_module_and_preset_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "presets/*.json", "py.typed")
        for path in (ROOT / "vllm_trimix").rglob(pattern)
    }
    packed = {name for name in wheel.namelist() if name.startswith("vllm_trimix/")}
    assert packed == expected
    assert any(name.endswith(".json") for name in packed)


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    text = _metadata(wheel, "entry_points.txt")
    assert "[vllm.general_plugins]\ntrimix = vllm_trimix.plugin:register" in text
    assert "[console_scripts]\nvllm-trimix = vllm_trimix.cli.main:main" in text


def test_neither_vllm_nor_torch_is_a_dependency(wheel: zipfile.ZipFile) -> None:
    lines = _metadata(wheel, "METADATA").splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert [line for line in required if "extra ==" not in line] == ["packaging", "pydantic>=2"]
    assert not [line for line in required if line.startswith(("vllm", "torch"))]
