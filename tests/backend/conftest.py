"""The vLLM versions that the CUDA path is driven on, each in one process for the whole session."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.backend.report import ROOT, Child

NEXT_VLLM = "0.33.0"
NEXT_SOURCE = ROOT / "build" / "vllm-0.33-src"


def fetch_source(version: str, folder: Path) -> str | None:
    """Puts the Python source of a vLLM release into ``folder``, once: its CUDA wheel without the compiled code.

    Returns:
        Why there is none, or None.
    """
    if folder.exists():
        return None
    wheels, part = folder.with_suffix(".wheel"), folder.with_suffix(".part")
    for leftover in (wheels, part):
        shutil.rmtree(leftover, ignore_errors=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    try:
        subprocess.run(
            [*command, f"vllm=={version}", "-d", str(wheels)], check=True, timeout=600, capture_output=True, text=True
        )
        with zipfile.ZipFile(next(wheels.glob("*.whl"))) as wheel:
            wheel.extractall(part, [name for name in wheel.namelist() if name.endswith((".py", ".json", "/METADATA"))])
        part.rename(folder)
    except subprocess.CalledProcessError as error:
        return f"vLLM {version} can't be downloaded: {error.stderr.strip()[-300:]}"
    except (subprocess.TimeoutExpired, OSError, StopIteration, zipfile.BadZipFile) as error:
        return f"vLLM {version} can't be downloaded: {error!r}"
    finally:
        shutil.rmtree(wheels, ignore_errors=True)
    return None


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives a version's report; the processes run side by side and end with the session."""
    pytest.importorskip("vllm", reason="the CUDA path is composed from vLLM's own classes")
    pytest.importorskip("triton", reason="the kernels run in Triton's interpreter (Linux)")
    folder = tmp_path_factory.mktemp("composition")
    children: dict[str, Child] = {"installed": Child(folder / "installed.json", source=None)}
    missing = fetch_source(NEXT_VLLM, NEXT_SOURCE)
    if missing is None:
        children["0.33"] = Child(folder / "next.json", source=NEXT_SOURCE)
    found: dict[str, dict[str, Any]] = {}

    def report(version: str) -> dict[str, Any]:
        if version not in children:
            pytest.skip(str(missing))
        if version not in found:
            found[version] = children[version].report()
        return found[version]

    yield report
    for child in children.values():
        child.process.kill()
        child.process.wait()


@pytest.fixture(params=["installed", "0.33"])
def report(request: pytest.FixtureRequest, reports: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """One version's report."""
    return reports(request.param)
