"""Stages that do next to nothing, and the command line around them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


TRIVIAL = """
import json, os, subprocess, sys, time
from pathlib import Path
from benchmarks.gpu.running.runner import main
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
