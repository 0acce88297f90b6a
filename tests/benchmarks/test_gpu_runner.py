"""How the GPU run's stages are run, resumed and ended, on stages that do next to nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu.report import save
from benchmarks.gpu.runner import source_digest

ROOT = Path(__file__).parents[2]
RUN_ALL = ROOT / "benchmarks" / "gpu" / "run_all.sh"

TRIVIAL = """
import json, os, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.runner import Stage, main

def good(report):
    with open(report.folder.parent / "ran", "a") as file:
        file.write("good\\n")
    report.figure(speed=3)
    report.check("two and two", 2 + 2 == 4, "four")

def bad(report):
    with open(report.folder.parent / "ran", "a") as file:
        file.write("bad\\n")
    (report.folder / "rounds").write_text("kept")
    report.check("first", True)
    report.check("pipes | and\\nlines", False, "seven " * 100)

def raises(report):
    report.check("before", True)
    raise RuntimeError("no device")

def empty(report):
    pass

def skips(report):
    report.skip("too small a device")

def hangs(report):
    report.check("before", True, "kept")
    here = Path(__file__).parent
    with open(report.folder / "pids", "w") as file:
        for server in ("tidy.py", "deaf.py"):
            subprocess.run([sys.executable, str(here / "middle.py"), str(here / server)], stdout=file, check=True)
    time.sleep(600)

NAMES = os.environ["TRIVIAL"].split(",")
STAGES = [Stage(n, f"trivial:{n}", 5, f"about {n}", {"n": 1}, {"n": 2}) for n in NAMES]

def probe(toy):
    return {"device": os.environ.get("TRIVIAL_DEVICE", "cuda"), "date": "today", "commit": "c", "versions": {"v": "1"}}

if __name__ == "__main__":
    sys.exit(main(STAGES, probe))
"""


# Servers lead sessions of their own, and may be stopped or have lost their parent.
MIDDLE = """
import subprocess, sys
subprocess.Popen([sys.executable, sys.argv[1]], start_new_session=True)
"""
TIDY = """
import os, pathlib, signal, sys
def tidy(*_):
    pathlib.Path(__file__).with_name("tidied").touch()
    sys.exit()
signal.signal(signal.SIGTERM, tidy)
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
signal.pause()
"""
DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getpid(), flush=True)
time.sleep(600)
"""


class Trivial:
    """A command line around stages that do next to nothing."""

    def __init__(self, folder: Path) -> None:
        for name, text in (("trivial", TRIVIAL), ("middle", MIDDLE), ("tidy", TIDY), ("deaf", DEAF)):
            (folder / f"{name}.py").write_text(text)
        self.folder, self.output = folder, folder / "out"

    def start(self, stages: str, *arguments: str, device: str = "cuda") -> subprocess.Popen[str]:
        path = os.pathsep.join([str(self.folder), str(ROOT)])
        # A child inherits what nohup or a shell's background job ignores.
        signals = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)
        before = [signal.signal(number, signal.SIG_DFL) for number in signals]
        try:
            return subprocess.Popen(
                [sys.executable, str(self.folder / "trivial.py"), f"--output={self.output}", *arguments],
                env={**os.environ, "PYTHONPATH": path, "TRIVIAL": stages, "TRIVIAL_DEVICE": device},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
            )
        finally:
            for number, handler in zip(signals, before, strict=True):
                signal.signal(number, handler)

    def run(self, stages: str, *arguments: str, device: str = "cuda") -> tuple[int, str]:
        process = self.start(stages, *arguments, device=device)
        out, _ = process.communicate(timeout=120)
        return process.returncode, out

    def result(self, stage: str) -> dict[str, Any]:
        return json.loads((self.output / f"{stage}.json").read_text())

    def ran(self) -> Counter[str]:
        return Counter((self.output / "ran").read_text().split())

    def servers(self) -> list[int]:
        """Process ids of the servers of ``hangs``, once they are there."""
        file = self.output / "hangs" / "pids"
        deadline = time.monotonic() + 60
        while not (file.exists() and file.read_text().count("\n") == 2):
            assert time.monotonic() < deadline, "the stage did not start its servers"
            time.sleep(0.05)
        return [int(line) for line in file.read_text().split()]

    @property
    def tidied(self) -> bool:
        """Whether the server that could was let tidy up."""
        return (self.folder / "tidied").exists()


@pytest.fixture
def trivial(tmp_path: Path) -> Trivial:
    return Trivial(tmp_path)


def test_a_failing_stage_stops_nothing(trivial: Trivial) -> None:
    status, out = trivial.run("bad,raises,empty,skips,good")
    assert status == 1, out
    good = trivial.result("good")
    assert (good["status"], good["speed"], good["seen"]) == ("passed", 3, "1 checks passed")
    assert good["checks"] == [{"name": "two and two", "passed": True, "detail": "four"}]
    assert good["settings"] == {"toy": False, "device": "cuda", "group": None, "n": 1}
    assert good["environment"]["versions"] == {"v": "1"}
    assert trivial.result("bad")["status"] == "failed"
    raised = trivial.result("raises")
    assert raised["status"] == "failed"
    assert raised["checks"][-1]["detail"] == "RuntimeError: no device"
    assert "RuntimeError: no device" in (trivial.output / "raises.log").read_text()
    assert trivial.result("empty")["seen"] == "it checked nothing"
    assert trivial.result("skips")["status"] == "skipped"
    summary = (trivial.output / "summary.md").read_text().splitlines()
    rows = {line.split("|")[1].strip(): line for line in summary if line.startswith("|")}
    assert "| passed |" in rows["good"]
    assert "| failed |" in rows["bad"]
    assert "pipes \\| and lines: seven" in rows["bad"]
    assert rows["bad"].endswith("... |")
    assert "too small a device" in rows["skips"]


@pytest.mark.parametrize("device", ["cuda", "cpu"], ids=["in-turn", "side-by-side"])
def test_only_what_passed_is_not_run_again(trivial: Trivial, device: str) -> None:
    for _ in range(2):
        assert trivial.run("good,bad", device=device)[0] == 1
    assert trivial.ran() == {"good": 1, "bad": 2}
    assert (trivial.output / "bad" / "rounds").exists()
    # Other settings: again, and nothing of the others is continued.
    (trivial.output / "good").mkdir(exist_ok=True)
    (trivial.output / "good" / "stale").touch()
    assert trivial.run("good", "--toy", device=device)[0] == 0
    assert trivial.ran()["good"] == 2
    assert trivial.result("good")["settings"]["n"] == 2
    assert not (trivial.output / "good" / "stale").exists()
    # Another machine's, or another code's, result doesn't count.
    for field, value in (("environment", {"device": device}), ("source", "other")):
        save(trivial.output / "good.json", {**trivial.result("good"), field: value})
        assert trivial.run("good", "--toy", device=device)[0] == 0
    assert trivial.ran()["good"] == 4


def test_half_a_result_is_none(trivial: Trivial) -> None:
    trivial.run("good")
    (trivial.output / "good.json").write_text('{"stage": "good", "stat')
    assert trivial.run("good")[0] == 0
    assert trivial.ran() == {"good": 2}


def test_a_stage_over_its_time_is_ended_with_its_servers(trivial: Trivial) -> None:
    status, out = trivial.run("hangs,good", "--stage-limit=6")
    assert status == 1, out
    result = trivial.result("hangs")
    assert (result["status"], result["checks"][0]["detail"]) == ("timeout", "kept")
    assert "ended after 6 s; 1 checks had passed" in result["seen"]
    assert not any(psutil.pid_exists(server) for server in trivial.servers())
    assert trivial.tidied
    assert trivial.result("good")["status"] == "passed"


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 143)])
def test_an_interrupted_run_leaves_no_process(trivial: Trivial, number: signal.Signals, status: int) -> None:
    process = trivial.start("hangs,good")
    servers = trivial.servers()
    below = psutil.Process(process.pid).children(recursive=True)
    assert all(psutil.pid_exists(server) for server in servers)
    assert len(below) >= 2, "supervisor and stage"
    process.send_signal(number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == status, out
    assert not any(psutil.pid_exists(server) for server in servers)
    assert trivial.tidied
    assert not any(child.is_running() for child in below)
    assert trivial.result("hangs")["seen"] == "interrupted"
    assert "| hangs | failed |" in (trivial.output / "summary.md").read_text()
    assert not (trivial.output / "good.json").exists()


def test_a_budget_leaves_what_does_not_fit(trivial: Trivial) -> None:
    status, out = trivial.run("good,bad", "--budget=4")
    assert status == 0, out
    assert "left: good, bad" in out
    assert "| good | left |" in (trivial.output / "summary.md").read_text()
    # A stage never runs past the budget.
    status, _ = trivial.run("hangs", "--budget=7")
    assert trivial.result("hangs")["status"] == "timeout"
    assert trivial.result("hangs")["seconds"] < 20


def test_stages_are_chosen_in_their_order(trivial: Trivial) -> None:
    status, out = trivial.run("good,bad,empty", "--only=empty,good", "--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == ["good", "empty"]
    assert (
        trivial.run("good,bad", "--only=godo")[1]
        == "run_all.sh: error: --only: unknown stage 'godo'; did you mean 'good'?\n"
    )
    assert "names no stage; stages: good, bad" in trivial.run("good,bad", "--only=,")[1]
    assert "unknown stage '12345'; stages: good" in trivial.run("good", "--only=12345")[1]
    assert not trivial.output.exists()


def test_any_changed_source_counts(tmp_path: Path) -> None:
    file = tmp_path / "vllm_trimix" / "kernels" / "one.py"
    file.parent.mkdir(parents=True)
    digests = [source_digest(tmp_path)]
    for path, text in ((file, "a"), (file, "b"), (file.with_name("two.py"), "b")):
        path.write_text(text)
        digests.append(source_digest(tmp_path))
    assert len(set(digests)) == 4
