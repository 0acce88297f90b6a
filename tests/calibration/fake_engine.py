"""Speaks as ``backend/engines/calibration.py`` does, without an engine: ``FAKE_ENGINE`` in the environment says how.

Keys, all optional: ``crossing`` (break-even, tokens) and ``dynamic_crossing`` (of the shallow pattern),
``resolved`` (changes to what ran), ``error`` (refuses the job), ``die_at`` and ``hang_at`` (number of the request),
``rows`` and ``dynamic_rows`` (whether the log counts them), ``pids`` (a file for the ids of this process and of a child
that would outlive it).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from tests.calibration.machine import Machine, triangle_ratio
from vllm_trimix.calibration.break_even import VARIANTS

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
SHALLOW = {
    "layers": [0, 1, 2, 3],
    "patterns": [{"pattern": "flexprefill", "gamma": 0.9, "tau": 0.1, "block_size": 128}],
    "last_n": 128,
    "min_seq_len": 0,
    "source": "config",
}
SHALLOW_DENSE_LEN = 128 + 127
# Of the keys of a dynamic request, whatever its length.
DENSITY = 0.25


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
            "shallow_dense_len": SHALLOW_DENSE_LEN if how.get("resolved", {}).get("shallow") else None,
            "hardware": "none",
            "versions": {},
            "engine": {},
        }
        replies.write(json.dumps({"ready": facts, "longest": job["max_length"] or 32768}) + "\n")
        ratio = triangle_ratio(how.get("crossing", 1300))
        dynamic = triangle_ratio(how.get("dynamic_crossing", 3000))
        machine = Machine(
            lambda length: 1.0 if length <= DENSE_LEN else ratio(length),
            dynamic_ratio=lambda length: 1.0 if length <= SHALLOW_DENSE_LEN else dynamic(length),
            noise=0.001,
        )
        for number, line in enumerate(sys.stdin):
            request = json.loads(line)
            (variant,) = [name for name, extra_args in VARIANTS.items() if extra_args == request["extra_args"]]
            if number == how.get("die_at"):
                print("(EngineCore pid=1) ERROR [core.py:1] ValueError: out of pages", flush=True)
                raise RuntimeError("EngineCore died")
            if number == how.get("hang_at"):
                time.sleep(300)
            if how.get("rows", True):
                print(f"(EngineCore pid=1) INFO TRIMIX rows: triangle={request['length']} last_n=1", flush=True)
            if how.get("dynamic_rows", True) and variant == "dynamic":
                keys = 1000 * request["length"]
                print(
                    f"(EngineCore pid=1) INFO TRIMIX rows: triangle=0 triangle_layer_rows=0 dynamic_layer_rows=4 "
                    f"keys_read={int(DENSITY * keys)} keys_causal={keys} density_since_start=0.9 requests=1",
                    flush=True,
                )
            seconds = machine.ask(request["length"], request["seed"], variant)
            replies.write(json.dumps({"seconds": seconds / 1000}) + "\n")


if __name__ == "__main__":
    main()
