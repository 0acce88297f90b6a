"""The programs of stages and their command line: see ``run_all.sh``, ``first.sh`` and ``second.sh``."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from benchmarks.environment import environment
from benchmarks.gpu.prepared import FIRST, SECOND
from benchmarks.gpu.running.runner import main
from benchmarks.gpu.running.source import ROOT
from benchmarks.gpu.stage import Program
from benchmarks.gpu.stages import STAGES

PROGRAMS = {
    "all": Program("run_all.sh", STAGES, None, "everything, about 28 minutes on an H200 and more for dynamic rows"),
    "first": Program("first.sh", FIRST, 270.0, "is it right, and one line of speed: 4.5 minutes"),
    "second": Program("second.sh", SECOND, 300.0, "how fast it is: 5 minutes"),
}

_PROBE = """
import importlib.metadata, json, sys
try:
    import pydantic, torch, vllm
    import vllm_trimix
except ImportError as error:
    print(json.dumps({"error": f"{sys.executable} can't import {error.name}: {error}; install vLLM for it, name "
                      "another (PYTHON=...), or give a packed one (--archive)"}))
    sys.exit()
points = importlib.metadata.entry_points(group="vllm.general_plugins", name="trimix")
if not points:
    print(json.dumps({"error": "vLLM would not find TRIMIX: no entry point vllm.general_plugins:trimix on this path; "
                      "start the stages by run_all.sh, or install the checkout"}))
    sys.exit()
found = {"device": "cpu", "package": vllm_trimix.__path__[0], "torch": torch.__version__}
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    found |= {"device": "cuda", "device_name": properties.name, "device_memory_bytes": properties.total_memory}
    found |= {"compute_capability": f"{properties.major}.{properties.minor}", "cuda": torch.version.cuda}
print(json.dumps(found))
"""


def probe(toy: bool) -> dict[str, Any]:
    """What this machine is, found out in a process of its own, so that none here holds the device.

    Raises:
        ValueError: Nothing can run, and why.
    """
    child = subprocess.run([sys.executable, "-c", _PROBE], cwd=ROOT, capture_output=True, text=True, check=False)
    try:
        found = json.loads(child.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        last = (child.stderr.strip().splitlines() or ["no output"])[-1]
        raise ValueError(f"{sys.executable} can't be probed: {last}") from None
    if "error" in found:
        raise ValueError(found["error"])
    if found["device"] != "cuda" and not toy:
        raise ValueError(
            f"no CUDA device: torch {found['torch']} sees none; run it on a machine with an NVIDIA GPU, or rehearse "
            "every stage at toy size with --toy"
        )
    return {**environment(), **found}


if __name__ == "__main__":
    sys.exit(main(PROGRAMS, probe))
