"""Programs of a multiprocessor, against NVIDIA's occupancy calculator's rules, worked out by hand."""

from __future__ import annotations

import pytest

from vllm_trimix.kernels.occupancy import programs_per_multiprocessor


@pytest.mark.parametrize(
    ("capability", "registers", "shared_kib", "num_warps", "columns", "programs", "why"),
    [
        (90, 128, 48, 8, 0, 2, "65536 registers of 32768 a program"),
        (90, 129, 48, 8, 0, 1, "too many for two"),
        (90, 33, 0, 2, 0, 24, "40 registers are handed out, to 12 warps of each scheduler"),
        (90, 168, 40, 4, 0, 3, "21504 registers a program"),
        (90, 255, 16, 8, 0, 1, "255 registers and 8 warps leave nothing for a second"),
        (90, 32, 100, 4, 0, 2, "228 KiB, of which each takes 101"),
        (90, 32, 113, 4, 0, 2, "twice 114 KiB fit exactly"),
        (90, 32, 113.125, 4, 0, 1, "and not a byte more"),
        (80, 32, 100, 4, 0, 1, "164 KiB"),
        (90, 16, 0, 8, 0, 8, "64 warps"),
        (86, 16, 0, 8, 0, 6, "48 warps"),
        (90, 16, 0, 1, 0, 32, "32 programs"),
        (86, 16, 0, 1, 0, 16, "16 programs"),
        (90, 40, 1, 3, 0, 16, "12 warps of each scheduler: 48 by three"),
        (100, 32, 16, 4, 256, 2, "512 columns of tensor memory"),
        (100, 32, 16, 4, 512, 1, "all of them"),
        (86, 32, 100, 4, 0, 0, "more than the 99 KiB that a program may take"),
    ],
)
def test_the_scarcest_resource_decides(
    capability: int, registers: int, shared_kib: float, num_warps: int, columns: int, programs: int, why: str
) -> None:
    found = programs_per_multiprocessor(
        capability,
        registers=registers,
        shared_bytes=int(1024 * shared_kib),
        num_warps=num_warps,
        tensor_memory_columns=columns,
    )
    assert found == programs, why


def test_an_unlisted_capability_is_refused() -> None:
    with pytest.raises(ValueError, match="capability 75 has no limits here; known are 80"):
        programs_per_multiprocessor(75, registers=32, shared_bytes=0, num_warps=4)
