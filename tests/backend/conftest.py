"""The vLLM versions that the CUDA path is driven on, each in one process for the whole session."""

from __future__ import annotations

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.backend.report import ROOT, Child
from tests.wheels import fetch

NEXT_VLLM = "0.33.0"
NEXT_SOURCE = ROOT / "build" / "vllm-0.33-src"


def _is_source(name: str) -> bool:
    return name.endswith((".py", ".json", "/METADATA"))


class _Children:
    """The processes, or why one is missing; they work while other tests run.

    One pytest process starts them, the first where xdist has several: the others read what they write.
    """

    def __init__(self, folder: Path, *, starts: bool) -> None:
        self._folder = folder if starts else None
        sources: dict[str, Path | None] = {"installed": None}
        self.missing = fetch(f"vllm=={NEXT_VLLM}", NEXT_SOURCE, wanted=_is_source)
        if self.missing is None:
            sources["0.33"] = NEXT_SOURCE
        folder.mkdir(exist_ok=True)
        outs = {version: folder / f"{version}.json" for version in sources}
        self.children = {
            version: Child.start(out, source=sources[version]) if starts else Child(out)
            for version, out in outs.items()
        }

    def wait(self) -> None:
        """Until all have ended that this process started."""
        for child in self.children.values() if self._folder else ():
            child.wait()

    def stop(self) -> None:
        for child in self.children.values():
            child.stop()
        if self._folder is not None:
            shutil.rmtree(self._folder)


_CHILDREN = pytest.StashKey[_Children]()


def _is_driven(item: pytest.Item) -> bool:
    return "reports" in getattr(item, "fixturenames", ())


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Last come the tests that read reports: by then the processes have written them."""
    items.sort(key=_is_driven)


def pytest_collection_finish(session: pytest.Session) -> None:
    collects = session.config.getoption("collectonly")
    if not collects and any(map(_is_driven, session.items)) and all(map(importlib.util.find_spec, ("vllm", "triton"))):
        worker = getattr(session.config, "workerinput", {"workerid": "gw0", "testrunuid": str(os.getpid())})
        folder = Path(tempfile.gettempdir()) / f"composition-{worker['testrunuid']}"
        session.config.stash[_CHILDREN] = _Children(folder, starts=worker["workerid"] == "gw0")


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Another worker may still wait for a report."""
    children = session.config.stash.get(_CHILDREN, None)
    stopped = session.shouldstop or session.shouldfail or session.exitstatus == pytest.ExitCode.INTERRUPTED
    if children is not None and hasattr(session.config, "workerinput") and not stopped:
        children.wait()


def pytest_unconfigure(config: pytest.Config) -> None:
    if (children := config.stash.get(_CHILDREN, None)) is not None:
        children.stop()


@pytest.fixture(scope="session")
def reports(request: pytest.FixtureRequest) -> Any:
    """Gives a version's report."""
    pytest.importorskip("vllm", reason="the CUDA path is composed from vLLM's own classes")
    pytest.importorskip("triton", reason="the kernels run in Triton's interpreter (Linux)")
    processes = request.config.stash[_CHILDREN]
    found: dict[str, dict[str, Any]] = {}

    def report(version: str) -> dict[str, Any]:
        if version not in processes.children:
            pytest.skip(str(processes.missing))
        if version not in found:
            found[version] = processes.children[version].report()
        return found[version]

    return report


@pytest.fixture(params=["installed", "0.33"])
def report(request: pytest.FixtureRequest, reports: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    """One version's report."""
    return reports(request.param)
