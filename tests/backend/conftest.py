"""The vLLM versions that the CUDA path is driven on, each in one process for the whole session."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.backend.report import ROOT, Child
from tests.wheels import fetch

NEXT_VLLM = "0.33.0"
NEXT_SOURCE = ROOT / "build" / "vllm-0.33-src"


def _is_source(name: str) -> bool:
    return name.endswith((".py", ".json", "/METADATA"))


@pytest.fixture(scope="session")
def reports(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Gives a version's report; the processes run side by side and end with the session."""
    pytest.importorskip("vllm", reason="the CUDA path is composed from vLLM's own classes")
    pytest.importorskip("triton", reason="the kernels run in Triton's interpreter (Linux)")
    folder = tmp_path_factory.mktemp("composition")
    children: dict[str, Child] = {"installed": Child(folder / "installed.json", source=None)}
    missing = fetch(f"vllm=={NEXT_VLLM}", NEXT_SOURCE, wanted=_is_source)
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
