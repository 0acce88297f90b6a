"""How many programs of a compiled kernel share a multiprocessor: registers, shared memory, warps, tensor memory."""

from __future__ import annotations

from typing import NamedTuple

_REGISTERS = 65536
_SCHEDULERS = 4
# Registers are handed out to warps in units of 256, shared memory in units of 128 bytes; each program takes one
# kibibyte more for the system (CUDA programming guide, "compute capabilities"; from 8.0 on).
_REGISTER_UNIT = 256
_SHARED_UNIT = 128
_SHARED_RESERVED = 1024
_TENSOR_MEMORY_COLUMNS = 512


class _Limits(NamedTuple):
    """Of one multiprocessor.

    Attributes:
        shared_kib: Shared memory.
        warps: Resident warps.
        programs: Resident programs.
    """

    shared_kib: int
    warps: int
    programs: int


# By compute capability times ten; CUDA programming guide, technical specifications.
_LIMITS = {
    80: _Limits(164, 64, 32),
    86: _Limits(100, 48, 16),
    89: _Limits(100, 48, 24),
    90: _Limits(228, 64, 32),
    100: _Limits(228, 64, 32),
    120: _Limits(100, 48, 24),
}


def programs_per_multiprocessor(
    capability: int, *, registers: int, shared_bytes: int, num_warps: int, tensor_memory_columns: int = 0
) -> int:
    """Programs that reside on a multiprocessor at a time; 0 if not even one fits.

    Args:
        capability: Compute capability times ten.
        registers: Registers a thread.
        shared_bytes: Shared memory a program.
        num_warps: Warps a program.
        tensor_memory_columns: Columns of tensor memory a program, of 512; Blackwell's data-centre GPUs only.

    Raises:
        ValueError: A capability whose limits aren't listed.
    """
    limits = _LIMITS.get(capability)
    if limits is None:
        raise ValueError(f"capability {capability} has no limits here; known are {', '.join(map(str, _LIMITS))}")
    warp_registers = -(-registers * 32 // _REGISTER_UNIT) * _REGISTER_UNIT
    # A warp stays with one of four schedulers, each with a quarter of the registers.
    by_registers = _SCHEDULERS * (_REGISTERS // _SCHEDULERS // warp_registers) // num_warps
    shared = -(-shared_bytes // _SHARED_UNIT) * _SHARED_UNIT + _SHARED_RESERVED
    fit = [by_registers, limits.shared_kib * 1024 // shared, limits.warps // num_warps, limits.programs]
    if tensor_memory_columns:
        fit.append(_TENSOR_MEMORY_COLUMNS // tensor_memory_columns)
    return min(fit)
