"""What this machine is called, for results and presets."""

from __future__ import annotations

import contextlib
import platform
import re
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
