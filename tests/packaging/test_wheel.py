"""What `pip install .` puts on a machine."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_trimix import __version__

ROOT = Path(__file__).parents[2]


def _source(folder: Path) -> Path:
    """A copy of what a build needs, without what was built in place."""
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    for name in ("vllm_trimix", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    # What a checkout has beside them once `make real-models` and `make serve` have run.
    for name in ("build/real-models/smollm2-135m", "build/demo-model", "benchmarks/real_models"):
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").touch()
        (folder / name / "__init__.py").touch()
    return folder


def _build(kind: str, source: Path, out: Path, **environment: str) -> tuple[Path, str]:
    """Builds a wheel or an sdist; returns its path and what was said."""
    if int(version("setuptools").partition(".")[0]) < 77:
        pytest.skip("building a wheel without network needs setuptools 77 in this environment (extra dev)")
    code = f"import sys; from setuptools import build_meta as b; print('built', b.build_{kind}(sys.argv[1]))"
    result = subprocess.run(
        [sys.executable, "-c", code, str(out)],
        cwd=source,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return out / result.stdout.rpartition("built ")[2].strip(), result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    source = _source(tmp_path_factory.mktemp("source"))
    path, said = _build("wheel", source, tmp_path_factory.mktemp("wheel"), VLLM_TRIMIX_BUILD_CPU="0")
    assert path.name.endswith("-py3-none-any.whl"), "pure Python must be enough"
    assert "compiled CPU kernel: not built, VLLM_TRIMIX_BUILD_CPU is 0" in said
    return zipfile.ZipFile(path)


def _needs_compiler() -> None:
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler on the PATH")
    if find_spec("torch") is None or platform.system() != "Linux":
        pytest.skip("the CPU kernel needs torch, on Linux")


@pytest.mark.slow
def test_a_wheel_holds_the_kernel_where_it_can_be_compiled(tmp_path: Path) -> None:
    _needs_compiler()
    source = tmp_path / "source"
    source.mkdir()
    path, _ = _build("wheel", _source(source), tmp_path, VLLM_TRIMIX_BUILD_CPU="1")
    assert "-cp311-abi3-linux_" in path.name
    assert "vllm_trimix/_cpu.abi3.so" in zipfile.ZipFile(path).namelist()


def test_a_compiler_that_fails_leaves_a_working_package(tmp_path: Path) -> None:
    _needs_compiler()
    source = tmp_path / "source"
    source.mkdir()
    path, said = _build("wheel", _source(source), tmp_path, VLLM_TRIMIX_BUILD_CPU="1", CXX="false")
    assert said.count("compiled CPU kernel: not built, compiling failed") == 1
    names = zipfile.ZipFile(path).namelist()
    assert "vllm_trimix/__init__.py" in names
    assert not [name for name in names if name.endswith(".so")]


@pytest.mark.parametrize("how", ["no-compiler", "no-torch"])
def test_without_a_compiler_or_torch_the_package_is_pure(how: str, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    _source(source)
    environment = {"VLLM_TRIMIX_BUILD_CPU": "", "CXX": "no-such-compiler"}
    if how == "no-torch":
        _needs_compiler()
        del environment["CXX"]
        setup = source / "setup.py"
        setup.write_text(setup.read_text().replace('find_spec("torch")', 'find_spec("no_such_torch")'))
    path, said = _build("wheel", source, tmp_path, **environment)
    assert path.name.endswith("-py3-none-any.whl")
    reason = "no C++ compiler (no-such-compiler)" if how == "no-compiler" else "torch is not installed"
    assert f"compiled CPU kernel: not built, {reason}" in said


def test_the_sdist_holds_the_sources(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    path, _ = _build("sdist", _source(source), tmp_path, VLLM_TRIMIX_BUILD_CPU="0")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.cpp", "*.h", "README.md")
        for path in (ROOT / "csrc").rglob(pattern)
    }
    assert len(expected) > 10
    assert expected | {"setup.py"} <= names
    assert not [name for name in names if name.endswith(".safetensors") or name.startswith(("build", "benchmarks"))]


def test_a_wheel_from_the_sdist_installs_clean(tmp_path: Path) -> None:
    """In an environment of its own, beside nothing but what it asks for; without vLLM its commands say what lacks."""
    source = tmp_path / "source"
    source.mkdir()
    sdist, _ = _build("sdist", _source(source), tmp_path, VLLM_TRIMIX_BUILD_CPU="0")
    # Not tarfile's own: its filters came with 3.11.4.
    shutil.unpack_archive(sdist, tmp_path / "unpacked")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    path, _ = _build("wheel", unpacked, tmp_path, VLLM_TRIMIX_BUILD_CPU="0")
    environment = tmp_path / "environment"
    venv.create(environment, with_pip=False)
    (packages,) = environment.glob("lib/python3*/site-packages")
    for name in ("packaging", "pydantic", "pydantic_core", "annotated_types", "typing_extensions", "typing_inspection"):
        found = next(Path(entry) for entry in sys.path if entry and list(Path(entry).glob(f"{name}-*.dist-info")))
        for part in (*found.glob(f"{name}.py"), *found.glob(name), *found.glob(f"{name}-*.dist-info")):
            (packages / part.name).symlink_to(part)
    pip = [sys.executable, "-m", "pip", "--python", str(environment / "bin" / "python")]
    subprocess.run([*pip, "install", "--quiet", "--no-index", str(path)], check=True)
    command = str(environment / "bin" / "vllm-trimix")
    says = {
        arguments: subprocess.run([command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        for arguments in (("--version",), ("presets",), ("doctor",))
    }
    assert says["--version",].stdout.split() == ["vllm-trimix", __version__]
    assert "Qwen/Qwen3-8B" in says["presets",].stdout
    assert says["doctor",].returncode == 1
    assert "Install a tested version" in says["doctor",].stdout
    assert "Traceback" not in says["doctor",].stderr


def _metadata(wheel: zipfile.ZipFile, name: str) -> str:
    (path,) = [entry for entry in wheel.namelist() if entry.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_every_module_and_preset_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    expected = {
        path.relative_to(ROOT).as_posix()
        for pattern in ("*.py", "presets/*.json", "reporting/page.*", "py.typed")
        for path in (ROOT / "vllm_trimix").rglob(pattern)
    }
    packed = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert any(name.endswith(".json") for name in packed)
    assert {"vllm_trimix/reporting/page.html", "vllm_trimix/reporting/page.css"} <= packed


def test_entry_points(wheel: zipfile.ZipFile) -> None:
    text = _metadata(wheel, "entry_points.txt")
    assert "[vllm.general_plugins]\ntrimix = vllm_trimix.plugin:register\n" in text
    assert "[vllm.platform_plugins]\ntrimix = vllm_trimix.plugin:register_name\n" in text
    assert "[console_scripts]\nvllm-trimix = vllm_trimix.cli.main:main" in text


def test_neither_vllm_nor_torch_is_a_dependency(wheel: zipfile.ZipFile) -> None:
    lines = _metadata(wheel, "METADATA").splitlines()
    required = [line.removeprefix("Requires-Dist: ") for line in lines if line.startswith("Requires-Dist: ")]
    assert [line for line in required if "extra ==" not in line] == ["packaging", "pydantic>=2"]
    assert not [line for line in required if line.startswith(("vllm", "torch"))]
