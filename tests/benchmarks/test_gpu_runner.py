"""How the GPU run's stages are run, resumed and ended, on stages that do next to nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest

from benchmarks.gpu.report import save
from benchmarks.gpu.source import source_digest

ROOT = Path(__file__).parents[2]
RUN_ALL = ROOT / "benchmarks" / "gpu" / "run_all.sh"

TRIVIAL = """
import json, os, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.runner import main
from benchmarks.gpu.stage import Program, Stage

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
    report.check("pipes | and\\nlines", False, "seven " * 200)

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

def mark(report, what):
    with open(report.folder.parent / "marks", "a") as file:
        file.write(f"{report.folder.name} {what} {time.monotonic()}\\n")

def beside(report):
    mark(report, "starts")
    time.sleep(float(os.environ.get("BESIDE_SECONDS", 1)))
    report.check("done", True)
    mark(report, "ends")

def prepared(report):
    mark(report, "prepares")
    time.sleep(float(os.environ.get("PREPARE_SECONDS", 0.2)))
    report.check("prepared", True)
    report.figure(granted=report.alone())
    mark(report, "starts")
    with report.on_device():
        time.sleep(float(os.environ.get("ALONE_SECONDS", 0.5)))
    report.check("measured", True)
    mark(report, "ends")

def make(name):
    # b1, b2: beside; p1, p2: prepared; others alone.
    kind = {"b": "beside", "p": "prepared"}.get(name[0]) if name[1:].isdigit() else None
    uses = {} if kind is None else {"use": kind, "limit": float(os.environ.get("LIMIT", 60)), "prepare": 6.0}
    return Stage(name, f"trivial:{kind or name}", 5, f"about {name}", {"n": 1}, {"n": 2}, **uses)

NAMES = os.environ["TRIVIAL"].split(",")
PROGRAMS = {"all": Program("run_all.sh", [make(name) for name in NAMES], None, "all")}

def probe(toy):
    return {"device": os.environ.get("TRIVIAL_DEVICE", "cuda"), "date": "today", "commit": "c", "versions": {"v": "1"}}

if __name__ == "__main__":
    sys.exit(main(PROGRAMS, probe))
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

    def start(self, stages: str, *arguments: str, device: str = "cuda", **env: str) -> subprocess.Popen[str]:
        path = os.pathsep.join([str(self.folder), str(ROOT)])
        return subprocess.Popen(
            [sys.executable, str(self.folder / "trivial.py"), f"--output={self.output}", *arguments],
            env={**os.environ, "PYTHONPATH": path, "TRIVIAL": stages, "TRIVIAL_DEVICE": device} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, stages: str, *arguments: str, device: str = "cuda", **env: str) -> tuple[int, str]:
        process = self.start(stages, *arguments, device=device, **env)
        out, _ = process.communicate(timeout=120)
        return process.returncode, out

    def result(self, stage: str) -> dict[str, Any]:
        return json.loads((self.output / f"{stage}.json").read_text())

    def ran(self) -> Counter[str]:
        return Counter((self.output / "ran").read_text().split())

    def marks(self) -> dict[tuple[str, str], float]:
        """When each stage prepared, started and ended, by name and word."""
        lines = [line.split() for line in (self.output / "marks").read_text().splitlines()]
        return {(name, what): float(when) for name, what, when in lines}

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


def test_stages_run_side_by_side_where_they_may(trivial: Trivial) -> None:
    status, out = trivial.run("b1,b2,good", "--jobs=2")
    assert status == 0, out
    at = trivial.marks()
    assert max(at["b1", "starts"], at["b2", "starts"]) < min(at["b1", "ends"], at["b2", "ends"])
    # What must be alone starts when both have ended.
    assert out.index("good: started") > max(out.index("b1: passed"), out.index("b2: passed"))
    trivial.run("b1,b2", "--jobs=1", "--toy")
    at = trivial.marks()
    assert at["b2", "starts"] > at["b1", "ends"]


def test_a_prepared_stage_has_the_device_to_itself(trivial: Trivial) -> None:
    status, out = trivial.run("p1,b1,p2", "--jobs=3", BESIDE_SECONDS="3")
    assert status == 0, out
    at = trivial.marks()
    assert max(at["p1", "prepares"], at["p2", "prepares"]) < at["b1", "ends"]
    order = [at["b1", "ends"], at["p1", "starts"], at["p1", "ends"], at["p2", "starts"]]
    assert order == sorted(order)
    first, second = trivial.result("p1"), trivial.result("p2")
    assert first["granted"] == 60
    assert first["device_seconds"] == pytest.approx(0.5, abs=0.3)
    # Waiting for the others is not its time.
    assert second["waited_seconds"] > 0.5
    assert second["seconds"] < at["p2", "ends"] - at["p2", "prepares"]


def test_a_prepared_stage_is_ended_in_either_phase(trivial: Trivial) -> None:
    status, _ = trivial.run("p1", PREPARE_SECONDS="60")
    assert (status, trivial.result("p1")["status"]) == (1, "timeout")
    assert "ended after 6 s" in trivial.result("p1")["seen"]
    status, _ = trivial.run("p1,b1", ALONE_SECONDS="60", LIMIT="9", BESIDE_SECONDS="4")
    assert trivial.result("p1")["status"] == "timeout"
    assert "ended after 9 s; 1 checks had passed" in trivial.result("p1")["seen"]
    assert trivial.result("b1")["status"] == "passed"


def test_time_is_kept_for_what_is_prepared(trivial: Trivial) -> None:
    # Of 14 seconds 5 are the prepared stage's: the others are ended before, and the last of them isn't begun.
    status, out = trivial.run("b1,p1,b2", "--jobs=2", "--budget=20", "--elapsed=6", BESIDE_SECONDS="60")
    assert status == 1, out
    assert trivial.result("b1")["status"] == "timeout"
    assert trivial.result("p1")["status"] == "passed"
    assert "b2: left, it needs 5 s of " in out
    assert "left: b2" in out


def test_a_prepared_stage_without_time_is_left(trivial: Trivial) -> None:
    status, out = trivial.run("p1,p2", "--jobs=2", "--budget=12", ALONE_SECONDS="60")
    assert (status, trivial.result("p1")["status"]) == (1, "timeout")
    assert "p2: left, " in out
    assert "are left for measuring" in out
    assert "| p2 | left |" in (trivial.output / "summary.md").read_text()


def test_what_is_taken_home_is_renewed_after_each_stage(trivial: Trivial, tmp_path: Path) -> None:
    home = tmp_path / "home"
    process = trivial.start("good,hangs", f"--bundle={home}")
    trivial.servers()
    assert json.loads((home / "results.json").read_text())["stages"]["good"]["status"] == "passed"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert sorted(path.name for path in home.iterdir()) == ["logs.tar.gz", "results.json", "summary.md"]
    found = json.loads((home / "results.json").read_text())
    assert found["stages"]["hangs"]["seen"] == "interrupted"
    assert "| hangs | failed |" in (home / "summary.md").read_text()
    with tarfile.open(home / "logs.tar.gz") as logs:
        assert {"good.log", "hangs.log"} <= set(logs.getnames())


def test_what_was_taken_home_counts_on_the_next_machine(trivial: Trivial, tmp_path: Path) -> None:
    home = tmp_path / "home"
    trivial.run("good,bad", f"--bundle={home}")
    (trivial.output / "good.json").unlink()
    trivial.run("good,bad", f"--resume={home / 'results.json'}")
    assert trivial.ran() == {"good": 1, "bad": 2}
    for text in ("", "[]", '{"stages": [1]}', '{"stages": {"good": 1}}'):
        (home / "results.json").write_text(text)
        status, out = trivial.run("good", f"--resume={home / 'results.json'}")
        assert status == 2
        assert out.startswith(f"run_all.sh: error: --resume: {home / 'results.json'} is not a bundle's results.json")


def test_a_long_log_keeps_its_ends(tmp_path: Path) -> None:
    from benchmarks.gpu.bundle import _MOST_LOG_BYTES, _ends

    log = tmp_path / "a.log"
    log.write_bytes(b"first " + bytes(_MOST_LOG_BYTES) + b" last")
    kept = _ends(log)
    assert kept.startswith(b"first ")
    assert kept.endswith(b" last")
    assert b"[11 bytes left out]" in kept


def test_bad_numbers_of_jobs_are_refused(trivial: Trivial) -> None:
    assert trivial.run("good", "--jobs=0")[1] == "run_all.sh: error: --jobs: 0 is below 1, one stage at a time\n"


def test_a_budget_that_is_none_and_a_folder_that_cannot_be_are_refused(trivial: Trivial, tmp_path: Path) -> None:
    assert trivial.run("good", "--budget=0")[1] == (
        "run_all.sh: error: --budget: 0 s is no time; give more than 0, or leave it out\n"
    )
    (tmp_path / "file").touch()
    status, out = trivial.run("good", f"--bundle={tmp_path / 'file' / 'home'}")
    assert status == 2
    assert out.startswith("run_all.sh: error: ")
    assert not (trivial.output / "ran").exists()


def test_a_bundle_that_fails_stops_nothing(trivial: Trivial, tmp_path: Path) -> None:
    home = tmp_path / "home"
    # A folder where a file must go.
    (home / "results.json").mkdir(parents=True)
    (home / "results.json" / "x").touch()
    status, out = trivial.run("good,b1", f"--bundle={home}")
    assert status == 0
    assert trivial.result("good")["status"] == trivial.result("b1")["status"] == "passed"
    assert out.count("--bundle: ") >= 2
