"""What verify.py asks the target's interpreter; each call prints one JSON line for each thing found out."""

from __future__ import annotations

import ctypes
import importlib
import importlib.metadata
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# What vLLM's layers and the FLASH_ATTN backend call in a dense decoder, by extension.
_OPERATORS = {
    "_C": ("rms_norm", "fused_add_rms_norm", "rotary_embedding", "silu_and_mul"),
    "_C_cache_ops": ("reshape_and_cache_flash",),
    "_vllm_fa3_C": ("fwd", "get_scheduler_metadata"),
}


def say(**found: Any) -> None:
    """Prints one thing that was found out."""
    # Modules may print while they are imported.
    print("\n" + json.dumps(found), flush=True)


def versions() -> None:
    """The interpreter and what it imports torch and Triton as."""
    # The target's: whether it can be imported is the question.
    import torch
    import triton

    say(python=".".join(map(str, sys.version_info[:2])), torch=torch.__version__, triton=triton.__version__)


def tools() -> None:
    """Where Triton keeps NVIDIA's cuobjdump, and the C source of its driver, which it compiles at first use."""
    # The target's: whether it can be imported is the question.
    import triton

    nvidia = Path(triton.__path__[0], "backends", "nvidia")
    say(cuobjdump=str(nvidia / "bin" / "cuobjdump"), driver=str(nvidia / "driver.c"))


def imports() -> None:
    """Imports the modules that standard input names, one after another."""
    for name in sys.stdin.read().split():
        # Said first: what kills the process is known.
        say(start=name)
        start = time.monotonic()
        error = None
        try:
            importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        # Modules end the process, or raise what isn't an Exception.
        except BaseException as raised:
            error = f"{type(raised).__name__}: {raised}"
        say(module=name, error=error, seconds=round(time.monotonic() - start, 2))
    # Threads and atexit handlers of two thousand modules have nothing to finish.
    sys.stdout.flush()
    os._exit(0)


def extensions(site: str) -> None:
    """Loads each extension with all symbols resolved, then looks for the operators that a dense decoder calls."""
    # The target's: whether it can be imported is the question.
    import torch

    # The platform module registers them as an engine would.
    importlib.import_module("vllm.platforms.cuda")
    importlib.import_module("vllm.vllm_flash_attn.flash_attn_interface")
    for path in sorted(Path(site, "vllm").rglob("*.so")):
        error = None
        try:
            ctypes.CDLL(str(path), os.RTLD_NOW)
        except OSError as raised:
            error = str(raised)
        say(extension=str(path.relative_to(site)), error=error)
    for library, operators in _OPERATORS.items():
        for operator in operators:
            say(operator=f"{library}.{operator}", found=hasattr(getattr(torch.ops, library), operator))


def requirements(site: str) -> None:
    """Compares what every carried package asks for with what would be imported."""
    # Only here: packaging is not needed to import vLLM.
    from packaging.requirements import Requirement

    for distribution in importlib.metadata.distributions(path=[site]):
        for line in distribution.requires or ():
            requirement = Requirement(line)
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                found = importlib.metadata.version(requirement.name)
            except importlib.metadata.PackageNotFoundError:
                found = None
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                say(package=distribution.metadata["Name"], requirement=line.split(";")[0].strip(), found=found)


if __name__ == "__main__":
    questions = (versions, tools, imports, extensions, requirements)
    {question.__name__: question for question in questions}[sys.argv[1]](*sys.argv[2:])
