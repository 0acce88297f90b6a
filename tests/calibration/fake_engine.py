"""Speaks as ``backend/calibration_engine.py`` does, without an engine: ``FAKE_ENGINE`` in the environment says how.

Keys, all optional: ``crossing`` (break-even, tokens), ``resolved`` (changes to what ran), ``error`` (refuses the job),
``die_at`` and ``hang_at`` (number of the request), ``rows`` (whether the log counts triangle rows), ``pids`` (a file
for the ids of this process and of a child that would outlive it).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.calibration.machine import Machine, triangle_ratio

DENSE_LEN = 8 + 512 + 128
RESOLVED = {
    "layers": [4, 5, 6, 7],
    "num_layers": 8,
    "n_init": 8,
    "n_local": 512,
    "last_n": 128,
    "min_prompt_len": 0,
    "dense_backend": None,
    "prompt_logprobs": "dense",
    "stats_log_interval": 0.5,
    "source": "config",
}


def main() -> None:
    how = json.loads(os.environ["FAKE_ENGINE"])
    if "pids" in how:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(300)"])
        Path(how["pids"]).write_text(f"{os.getpid()} {child.pid}")
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as replies:
        job = json.loads(sys.stdin.readline())
        if "error" in how:
            replies.write(json.dumps({"error": how["error"]}) + "\n")
            sys.exit(1)
        print("(EngineCore pid=1) INFO TRIMIX: layers=4-7 of=8 kernel=fake", flush=True)
        facts = {
            "resolved": {**RESOLVED, **how.get("resolved", {})},
            "hardware": "none",
            "versions": {},
            "engine": {},
        }
        replies.write(json.dumps({"ready": facts, "longest": job["max_length"] or 32768}) + "\n")
        ratio = triangle_ratio(how.get("crossing", 1300))
        machine = Machine(lambda length: 1.0 if length <= DENSE_LEN else ratio(length), noise=0.001)
        for number, line in enumerate(sys.stdin):
            request = json.loads(line)
            if number == how.get("die_at"):
                print("(EngineCore pid=1) ERROR [core.py:1] ValueError: out of pages", flush=True)
                raise RuntimeError("EngineCore died")
            if number == how.get("hang_at"):
                time.sleep(300)
            if how.get("rows", True):
                print(f"(EngineCore pid=1) INFO TRIMIX rows: triangle={request['length']} last_n=1", flush=True)
            seconds = machine.ask(request["length"], request["seed"], request["variant"])
            replies.write(json.dumps({"seconds": seconds / 1000}) + "\n")


if __name__ == "__main__":
    main()
