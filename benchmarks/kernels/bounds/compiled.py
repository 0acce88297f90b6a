"""What the compiler made of the kernels: reports of ``vllm_trimix.kernels.triton_compile``, stored by Triton version.

A test compiles anew and compares, so that no count here is older than the kernels.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSIONS = ("3.6.0", "3.7.1", "3.8.0")
SERVED = "3.7.1"
"""The version beside vLLM 0.32 on CUDA."""
_FOLDER = Path(__file__).parents[1] / "compiled"


@dataclass(frozen=True)
class Compiled:
    """One kernel variant.

    Attributes:
        warps: Warps a program.
        programs: Programs that share a multiprocessor.
        instructions: Machine instructions of a step without a mask; None where the loop can't be read (Blackwell).
        exponentials: Instructions of a step for the special-function units; None likewise.
    """

    warps: int
    programs: int
    instructions: int | None
    exponentials: int | None


def reports_file(version: str) -> Path:
    """Where a version's reports are."""
    return _FOLDER / f"triton-{version}.json"


@functools.cache
def read_reports(version: str) -> list[dict[str, Any]]:
    """A version's reports: the fields of ``triton_compile.Report``.

    Raises:
        ValueError: The version has none.
    """
    if version not in VERSIONS:
        raise ValueError(f"no kernels were compiled with Triton {version}; stored are {', '.join(VERSIONS)}")
    return json.loads(reports_file(version).read_text())


def compiled(
    kernel: str, capability: int, *, head_size: int = 128, dtype: str = "bf16", triton: str = SERVED
) -> Compiled:
    """A variant whose queries and cache have the same dtype.

    Args:
        kernel: As in ``triton_compile.Variant``.
        capability: Compute capability times ten.
        head_size: Head size.
        dtype: Dtype in Triton's spelling.
        triton: Version that compiled it.

    Raises:
        ValueError: No such variant is stored.
    """
    wanted = (kernel, capability, head_size, dtype, dtype)
    for report in read_reports(triton):
        v = report["variant"]
        if (v["kernel"], v["capability"], v["head_size"], v["q_dtype"], v["cache_dtype"]) == wanted:
            is_read = report["loop_instructions"] > 0
            return Compiled(
                warps=report["num_warps"],
                programs=report["programs"],
                instructions=report["loop_instructions"] - report["mask_instructions"] if is_read else None,
                exponentials=report["loop_exponentials"] if is_read else None,
            )
    raise ValueError(f"no stored report of {kernel}, sm_{capability}, head size {head_size}, {dtype}, Triton {triton}")
