"""What this machine's processor is fast at."""

from __future__ import annotations

from vllm_trimix.measurement.hardware import multiplies_bf16


def has_wide_vectors() -> bool:
    """Whether it has AVX-512, AMX or is no x86: else vLLM's dense attention takes several times as long."""
    return multiplies_bf16()


def fast_dtype() -> str:
    """``bfloat16`` where the processor multiplies it well, else ``float32``; for tests whose subject is another.

    Without AVX-512 and AMX a bf16 product takes some 60 times as long as one in fp32.
    """
    return "bfloat16" if multiplies_bf16() else "float32"
