"""Libraries in place of NVIDIA's driver: with them, vLLM's CUDA platform can be imported where there is no GPU.

libcuda.so.1 has the functions that the extensions name, so that the loader resolves every other symbol as it would on
a GPU; each answers CUDA_ERROR_NO_DEVICE. libnvidia-ml.so.1 reports one H200, which is all that vLLM and torch ask
before they use a device.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

# In a table of symbols, or called in C.
_FUNCTION = re.compile(rb"\b(cu[A-Z][A-Za-z0-9_]+)(?=[\0(])")
_NO_DEVICE = 100
_NVML = r"""
#include <string.h>
typedef struct { unsigned long long total, free, used; } memory;
int nvmlInit(void) { return 0; }
int nvmlInit_v2(void) { return 0; }
int nvmlInitWithFlags(unsigned flags) { return 0; }
int nvmlShutdown(void) { return 0; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 1; return 0; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) { *device = (void *)1; return 0; }
int nvmlDeviceGetName(void *device, char *name, unsigned size) { strncpy(name, "NVIDIA H200", size); return 0; }
int nvmlDeviceGetUUID(void *device, char *uuid, unsigned size) { strncpy(uuid, "GPU-0", size); return 0; }
int nvmlDeviceGetCudaComputeCapability(void *device, int *major, int *minor) { *major = 9; *minor = 0; return 0; }
int nvmlDeviceGetMemoryInfo(void *device, memory *found) { found->total = found->free = 150000000000ull; return 0; }
int nvmlSystemGetDriverVersion(char *version, unsigned size) { strncpy(version, "580.0", size); return 0; }
const char *nvmlErrorString(int error) { return "none"; }
"""


def build(folder: Path, users: Iterable[Path]) -> None:
    """Compiles both libraries into ``folder``.

    Args:
        folder: Doesn't exist yet.
        users: Extensions and C sources that name the driver's functions.

    Raises:
        ValueError: There is no gcc, or it fails.
    """
    folder.mkdir()
    names: set[str] = set()
    for path in users:
        names |= {found.decode() for found in _FUNCTION.findall(path.read_bytes())}
    functions = "".join(f"int {name}(void) {{ return {_NO_DEVICE}; }}\n" for name in sorted(names))
    for library, source in (("libcuda.so.1", functions), ("libnvidia-ml.so.1", _NVML)):
        command = ["gcc", "-shared", "-fPIC", "-w", "-x", "c", "-", "-o", str(folder / library)]
        try:
            child = subprocess.run(command, input=source, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            raise ValueError("gcc is not on the PATH; install it: it builds stand-ins for NVIDIA's driver") from None
        if child.returncode:
            raise ValueError(f"gcc can't build the stand-in for {library}: {child.stderr[-300:]}")
