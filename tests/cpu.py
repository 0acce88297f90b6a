"""What this machine's processor is fast at."""

from __future__ import annotations

import torch


def has_wide_vectors() -> bool:
    """Whether it has AVX-512, AMX or is no x86: else vLLM's dense attention takes several times as long."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "AVX2")


def fast_dtype() -> str:
    """``bfloat16`` where the processor multiplies it well, else ``float32``; for tests whose subject is another.

    Without AVX-512 and AMX a bf16 product takes some 60 times as long as one in fp32.
    """
    return "bfloat16" if has_wide_vectors() else "float32"
