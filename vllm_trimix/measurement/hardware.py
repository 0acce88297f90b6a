"""What this machine is called, for results and presets."""

from __future__ import annotations

import contextlib
import os
import platform
import re
import subprocess
from pathlib import Path


def cpuinfo() -> str:
    """Linux's description of the CPU; empty elsewhere."""
    with contextlib.suppress(OSError):
        return Path("/proc/cpuinfo").read_text()
    return ""


def cpu_name() -> str:
    """The CPU's model; where it names none (ARM), its architecture."""
    name = re.search(r"^model name\s*:\s*(.+)$", cpuinfo(), re.MULTILINE)
    return name[1] if name else platform.machine()


def usable_cpu() -> str:
    """The CPU, what it has for bf16, and the cores that this process may use."""
    flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{flag}\b", cpuinfo())]
    extensions = f" ({', '.join(flags)})" if flags else ""
    return f"{cpu_name()}{extensions}, {len(os.sched_getaffinity(0))} cores usable"


def multiplies_bf16() -> bool:
    """Whether the CPU multiplies bf16 well.

    An x86 processor without AVX-512 and AMX doesn't: a product takes some 60 times as long as in fp32.
    """
    flags = set(cpuinfo().split())
    return "avx2" not in flags or bool(flags & {"avx512f", "amx_tile"})


def this_machine() -> str:
    """The devices of this machine that an engine here computes on: its GPUs, or its CPU."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        query = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
        names = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split("\n")
        if found := [name.strip() for name in names if name.strip()]:
            return ", ".join(found)
    return f"{cpu_name()}, {os.cpu_count()} cores"
