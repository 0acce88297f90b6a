"""Runs a mutant's tests in a process forked from one that has imported what takes seconds, and nothing of the checkout.

Started by ``bench`` as a script of the copied tree; its arguments are more modules to import, or functions that import
(``module:function``). Reads jobs from its input and writes answers, a line of JSON each.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
import time
import traceback
from typing import Any

PRELOADED = ("numpy", "torch", "torch.nn.functional", "pydantic", "hypothesis", "pytest", "pytest_timeout", "packaging")
CRASH = "a crash"
SCENARIO = "scenario:"
"""Tests of this kind are scenarios of ``tests.backend``, without pytest."""


class Recorder:
    """Remembers the first test that failed."""

    def __init__(self) -> None:
        self.failed, self.passed = "", 0

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.passed += report.passed and report.when == "call"
        if report.failed and not self.failed:
            self.failed = report.nodeid

    def pytest_collectreport(self, report: Any) -> None:
        if report.failed and not self.failed:
            self.failed = f"import of {report.nodeid}"


def run_tests(tests: list[str]) -> dict[str, Any]:
    """What the tests say of the tree: the one that failed, or how many passed."""
    names = [test.removeprefix(SCENARIO) for test in tests if test.startswith(SCENARIO)]
    if names:
        from tests.mutants.scenario import first_wrong

        wrong = first_wrong(names)
        return {"failed": SCENARIO + wrong if wrong else "", "passed": len(names)}
    import pytest

    recorder = Recorder()
    options = ["-x", "-q", "--tb=short", "-m", "not slow", "-p", "pytest_timeout"]
    status = int(pytest.main([*options, *tests], plugins=[recorder]))
    if status and not recorder.failed:
        raise RuntimeError(f"pytest ended with status {status} and no failure")
    return {"failed": recorder.failed, "passed": recorder.passed}


def child(job: dict[str, Any], answer: int) -> None:
    """In the forked process: its output goes to the job's log."""
    os.setsid()
    log = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for number, opened in ((0, os.open(os.devnull, os.O_RDONLY)), (1, log), (2, log)):
        os.dup2(opened, number)
    try:
        found = run_tests(job["tests"])
        import vllm_trimix

        found["package"] = vllm_trimix.__file__
    except BaseException:
        found = {"error": traceback.format_exc()}
    sys.stdout.flush()
    os.write(answer, json.dumps(found).encode())
    os._exit(0)


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Forks, and ends whatever the tests have left."""
    start = time.monotonic()
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(reading)
        child(job, writing)
    os.close(writing)
    ready, _, _ = select.select([reading], [], [], job["timeout"])
    text = os.read(reading, 2**20) if ready else b""
    os.close(reading)
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        # It has not come to its own group yet, or has ended.
        os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    if text:
        found = json.loads(text)
    else:
        found = {"failed": CRASH, "passed": 0} if ready else {"late": True}
    return {**found, "seconds": round(time.monotonic() - start, 2)}


def main() -> None:
    # vLLM asks plugins while it is imported, and ours would bring the package as it is.
    allowed = os.environ.get("VLLM_PLUGINS")
    os.environ["VLLM_PLUGINS"] = ""
    for name in (*PRELOADED, *sys.argv[1:]):
        module, _, function = name.partition(":")
        found = importlib.import_module(module)
        if function:
            getattr(found, function)()
    del os.environ["VLLM_PLUGINS"]
    if allowed is not None:
        os.environ["VLLM_PLUGINS"] = allowed
    assert not [name for name in sys.modules if name.startswith("vllm_trimix")], "a mutant would not be imported"
    from hypothesis import Phase, settings

    # That a test fails is enough: no search for the simplest example, none from an earlier mutant.
    settings.register_profile("mutants", database=None, phases=(Phase.explicit, Phase.generate))
    settings.load_profile("mutants")
    for line in sys.stdin:
        print(json.dumps(run(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
