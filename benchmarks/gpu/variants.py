"""Which compiled kernels a process launched, what they need of the device, and how long they took to compile."""

from __future__ import annotations

import os
from typing import Any

import torch


class Record:
    """Of this process's launches, from ``install`` on; ``take`` empties it.

    Attributes:
        compile_s: Seconds in Triton's compiler; nothing for kernels that its cache holds.
    """

    def __init__(self) -> None:
        self.compile_s = 0.0
        self._kernels: dict[str, Any] = {}

    def install(self) -> None:
        """Listens to Triton's compiler and to its launches."""
        # Triton may be missing.
        from triton import knobs
        from triton.runtime.jit import JITFunction

        launch = JITFunction.run

        def run(function: Any, *args: Any, **kwargs: Any) -> Any:
            kernel = launch(function, *args, **kwargs)
            self._kernels[kernel.hash] = kernel
            return kernel

        def compiled(*, times: Any, cache_hit: bool, **_: Any) -> None:
            self.compile_s += 0.0 if cache_hit else times.total / 1e6

        JITFunction.run = run
        knobs.compilation.listener = compiled

    def take(self) -> list[dict[str, Any]]:
        """What was launched since the last call."""
        found = [facts(kernel) for kernel in self._kernels.values()]
        self._kernels.clear()
        self.compile_s = 0.0
        return found


RECORD = Record()
"""Of a worker process."""


def facts(kernel: Any) -> dict[str, Any]:
    """A compiled kernel in plain types; registers and spills are None until it was loaded onto a device."""
    metadata = kernel.metadata
    return {
        "kernel": metadata.name,
        "hash": kernel.hash[:12],
        "target": f"sm_{metadata.target.arch}",
        "num_warps": metadata.num_warps,
        "num_stages": metadata.num_stages,
        "shared_bytes": metadata.shared,
        "registers": getattr(kernel, "n_regs", None),
        "spills": getattr(kernel, "n_spills", None),
        "triton": metadata.triton_version,
    }


def ptxas_version() -> str:
    """Of the assembler that Triton calls for this device."""
    # Triton may be missing.
    from triton.backends.nvidia.compiler import get_ptxas_version

    major, minor = torch.cuda.get_device_capability()
    return str(get_ptxas_version(10 * major + minor)).strip().splitlines()[-1]


def use_device() -> None:
    """Prepares a worker process for launches on the device; without that, Triton may have been told to interpret."""
    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)
    torch.zeros(1, device="cuda")
    RECORD.install()


def device_is_sound() -> None:
    """Raises if this process's CUDA context is gone, as after an illegal address."""
    torch.cuda.synchronize()


def interpreter_is_sound() -> None:
    """Nothing spoils the interpreter for what comes next."""
