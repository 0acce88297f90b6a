"""The devices that the bounds are for, and where each number comes from."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Each cycle a multiprocessor of Hopper and Blackwell alike moves 128 bytes of shared memory, takes 16 exponentials and
# issues four instructions (CUDA programming guide; the first two also in FlashAttention 4's paper, arXiv 2603.05451).
SHARED_BYTES = 128
EXPONENTIALS = 16
SCHEDULERS = 4


@dataclass(frozen=True)
class Device:
    """One GPU.

    Attributes:
        name: Its key in ``DEVICES``.
        capability: Compute capability times ten.
        multiprocessors: Multiprocessors that are switched on.
        tensor_flop: Dense bf16 tensor cores, FLOP a cycle and multiprocessor.
        matmul_flop_s: Rate of a large bf16 matmul. The clock that this is the peak of stands for what the power limit
            leaves; kernels that draw less power may run at a higher one.
        l2_bytes_s: Reads from the L2 cache, all multiprocessors.
        hbm_bytes_s: Memory copy, bytes read and written.
        dense_flop_s: Dense attention, forward, causal, head size 128, long prompts.
        dense_kernel: Whose rate that is.
    """

    name: str
    capability: int
    multiprocessors: int
    tensor_flop: int
    matmul_flop_s: float
    l2_bytes_s: float
    hbm_bytes_s: float
    dense_flop_s: float
    dense_kernel: str

    @property
    def clock(self) -> float:
        """Cycles a second at which ``matmul_flop_s`` is the peak."""
        return self.matmul_flop_s / self.multiprocessors / self.tensor_flop


# 989 TFLOP/s at 1.83 GHz on 132 multiprocessors are 4096 FLOP a cycle (NVIDIA's H100 architecture paper); 2250 TFLOP/s
# on 148 at 1.85 GHz are 8192 (NVIDIA's data sheet of the HGX B200).
_HOPPER_FLOP, _BLACKWELL_FLOP = 4096, 8192
# MEASURED on an H200: 8192^3 bf16 matmul 788 TFLOP/s, copy 4.3 TB/s, 0.9 of the 4.8 TB/s of its data sheet.
_H200_MATMUL, _H200_COPY = 788e12, 4.3e12
# PUBLISHED microbenchmarks of H100, 5.5 to 7 TB/s.
_HOPPER_L2 = 5.5e12
# PUBLISHED: FlashAttention 3's paper, about what it shows on an H100; FlashAttention 4's, at most 1605 on a B200.
_FA3, _FA4 = 650e12, 1600e12

DEVICES = {
    device.name: device
    for device in (
        # ASSUMED: the matmul's rate is the H200's (the same chip and power limit). Data sheet: 3.35 TB/s, of which 0.9.
        Device("H100", 90, 132, _HOPPER_FLOP, _H200_MATMUL, _HOPPER_L2, 3.0e12, _FA3, "FA3"),
        Device("H200", 90, 132, _HOPPER_FLOP, _H200_MATMUL, _HOPPER_L2, _H200_COPY, _FA3, "FA3"),
        # ASSUMED: the H200's share of the data sheet's rates (2250 TFLOP/s, 8 TB/s), and twice Hopper's L2, for two
        # dies with one each.
        Device("B200", 100, 148, _BLACKWELL_FLOP, 0.8 * 2250e12, 2 * _HOPPER_L2, 0.9 * 8e12, _FA4, "FA4"),
    )
}


def device_for(torch_name: str) -> Device | None:
    """The device of a name as ``torch.cuda.get_device_name`` gives it; None where its numbers aren't known.

    Only SXM modules: PCIe and NVL cards, parts of a GPU (MIG) and GPUs beside a Grace have other clocks or sizes.
    """
    match = re.fullmatch(r"NVIDIA (H100|H200|B200)(?: \d+GB(?: HBM3e?)?)?", torch_name)
    return DEVICES[match[1]] if match else None


def device_named(name: str) -> Device:
    """A device by its key.

    Raises:
        ValueError: An unknown key.
    """
    if name not in DEVICES:
        raise ValueError(f"device {name!r} is not known; choose one of {', '.join(DEVICES)}, or ask device_for")
    return DEVICES[name]
