"""A copy of the checkout in which mutants are tried, one after the other."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from tests.mutants.forks import SCENARIO
from tests.mutants.scenario import USED

ROOT = Path(__file__).parents[2]
STORE = ROOT / "build" / "mutants.json"
_LEFT_OUT = (".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".hypothesis", "results", "figures")
# A mutant may take this much longer than the sources as they are, plus some seconds, before it counts as stuck.
_PATIENCE, _GRACE = 10, 60
# Tests that import vLLM first of all start from a process that has done so.
_PRELOADED = {
    "tests/backend/test_admission.py": "vllm.v1.engine.input_processor",
    SCENARIO: "tests.mutants.scenario:preload",
}


class Mutant(NamedTuple):
    """A defect, as data.

    Attributes:
        name: Unique; what it breaks.
        path: File in the checkout.
        old: The text in it that is replaced; it occurs once.
        new: What stands there instead.
        tests: The tests that must notice: arguments of pytest, or ``scenario:NAME`` of ``tests.backend``.
    """

    name: str
    path: str
    old: str
    new: str
    tests: tuple[str, ...]

    @property
    def text(self) -> str:
        """The file with the defect.

        Raises:
            ValueError: The old text does not occur once.
        """
        source = (ROOT / self.path).read_text()
        count = source.count(self.old)
        if count != 1:
            raise ValueError(f"{self.name}: its old text occurs {count} times in {self.path}, must be once")
        return source.replace(self.old, self.new)


class Outcome(NamedTuple):
    """What came of a mutant.

    Attributes:
        killed_by: The test that failed, ``a crash``, ``its time limit``, or nothing: it survived.
        seconds: In its tests.
    """

    killed_by: str
    seconds: float


TIME_LIMIT = "its time limit"


class Bench:
    """Tries mutants in a copy of the checkout; the checkout itself is never touched.

    Outcomes are kept under ``build``, by everything that decides them: a run that was stopped goes on where it was.
    """

    def __init__(self, folder: Path, *, store: Path | None = STORE) -> None:
        """Copies the checkout.

        Args:
            folder: Where to; made here.
            store: Where outcomes are kept; None keeps none.
        """
        self.tree = folder / "tree"
        shutil.copytree(ROOT, self.tree, ignore=shutil.ignore_patterns(*_LEFT_OUT))
        (self.tree / "build").mkdir()
        self._store = store
        self._kept = {} if store is None else _read(store)
        self._processes: dict[str, subprocess.Popen[str]] = {}
        self._sources = self._digest()

    def _digest(self) -> str:
        digest = hashlib.sha256(sys.version.encode())
        for folder in ("vllm_trimix", "tests"):
            for path in sorted((self.tree / folder).rglob("*")):
                if path.is_file() and self.tree / "tests" / "mutants" not in path.parents:
                    digest.update(f"{path.relative_to(self.tree)}\0".encode() + path.read_bytes())
        return digest.hexdigest()

    def try_out(self, path: str, text: str, tests: tuple[str, ...]) -> Outcome:
        """Runs tests on a file with a defect, unless the outcome is known.

        Args:
            path: The file, in the checkout.
            text: What it holds.
            tests: As ``Mutant.tests``.

        Raises:
            RuntimeError: The tests fail without the defect, or nothing ran.
        """
        key = self._key(path, text, tests)
        if key not in self._kept:
            limit = _GRACE + _PATIENCE * self._baseline(tests)
            with self._written(self.tree / path, text):
                found = self._run(tests, timeout=limit)
            if "late" in found:
                # Not kept: a busy machine may be why.
                return Outcome(TIME_LIMIT, found["seconds"])
            self._keep(key, [found["failed"], found["seconds"]])
        return Outcome(*self._kept[key])

    def _baseline(self, tests: tuple[str, ...]) -> float:
        """Seconds of some tests on the sources as they are, which they must pass."""
        if tests[0].startswith(SCENARIO):
            tests = tuple(f"{SCENARIO}{name}" for name in USED)
        key = self._key("", "", tests)
        if key not in self._kept:
            found = self._run(tests, timeout=900)
            if "late" in found or found["failed"] or not found["passed"]:
                raise RuntimeError(f"{tests} on the sources as they are: {found}\n{self._log.read_text()[-4000:]}")
            self._keep(key, found["seconds"])
        return float(self._kept[key])

    def _key(self, path: str, text: str, tests: tuple[str, ...]) -> str:
        return hashlib.sha256("\0".join((self._sources, path, text, *tests)).encode()).hexdigest()

    def _keep(self, key: str, value: Any) -> None:
        self._kept[key] = value
        if self._store is not None:
            # Another run may have added its own.
            self._kept = {**_read(self._store), **self._kept}
            self._store.parent.mkdir(exist_ok=True)
            part = self._store.with_suffix(".part")
            part.write_text(json.dumps(self._kept))
            part.replace(self._store)

    @contextlib.contextmanager
    def _written(self, path: Path, text: str) -> Iterator[None]:
        source = path.read_text()
        path.write_text(text)
        try:
            yield
        finally:
            path.write_text(source)

    @property
    def _log(self) -> Path:
        return self.tree / "build" / "mutant.log"

    def _run(self, tests: tuple[str, ...], *, timeout: float) -> dict[str, Any]:
        module = next((module for start, module in _PRELOADED.items() if tests[0].startswith(start)), "")
        if module not in self._processes:
            self._processes[module] = self._start(module)
        process = self._processes[module]
        assert process.stdin is not None
        assert process.stdout is not None
        job = {"tests": tests, "timeout": timeout, "log": str(self._log)}
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        found: dict[str, Any] = json.loads(process.stdout.readline())
        if "error" in found:
            raise RuntimeError(f"{tests}: {found['error']}\n{self._log.read_text()[-4000:]}")
        package = found.get("package")
        if package is not None and not Path(package).is_relative_to(self.tree):
            raise RuntimeError(f"the tests imported {package}, not the copy under {self.tree}")
        return found

    def _start(self, module: str) -> subprocess.Popen[str]:
        # One thread: a process whose libraries have started threads can't be forked. No byte code: a file that changes
        # twice in a second would be taken for unchanged.
        variables = {
            "PYTHONPATH": os.pathsep.join([str(self.tree), os.environ.get("PYTHONPATH", "")]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
            "OMP_NUM_THREADS": "1",
        }
        return subprocess.Popen(
            [sys.executable, "-P", str(self.tree / "tests" / "mutants" / "forks.py"), *([module] if module else [])],
            cwd=self.tree,
            env={name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"} | variables,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def close(self) -> None:
        """Ends the processes that fork, and removes the copy."""
        for process in self._processes.values():
            assert process.stdin is not None
            process.stdin.close()
            process.wait(timeout=30)
        shutil.rmtree(self.tree)


def _read(store: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(store.read_text()) if store.exists() else {}
    return found
