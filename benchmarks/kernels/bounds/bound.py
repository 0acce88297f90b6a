"""The least time of a kernel launch: each resource alone, and programs as they fill the multiprocessors."""

from __future__ import annotations

import heapq
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from benchmarks.kernels.bounds.compiled import Compiled
from benchmarks.kernels.bounds.devices import EXPONENTIALS, SCHEDULERS, SHARED_BYTES, Device
from vllm_trimix.kernels.triton_configs import TileConfig

# A program's own latencies, in cycles: its item, its pages and its first keys one after the other (600 each from L2),
# and the output's way through shared memory.
_FIXED_CYCLES = 2400
_ELEMENT_BYTES = 2


@dataclass(frozen=True)
class Bound:
    """The least time of some launches, one after the other.

    Attributes:
        alone: Seconds that each resource needs if nothing else takes any.
        deciding: The launches' seconds at best, by the resource that decides each; latencies and the uneven end go with
            what a multiprocessor is busy with.
    """

    alone: Mapping[str, float]
    deciding: Mapping[str, float]

    def __add__(self, other: Bound) -> Bound:
        return Bound(_sums(self.alone, other.alone), _sums(self.deciding, other.deciding))

    @property
    def seconds(self) -> float:
        """At best."""
        return sum(self.deciding.values())

    @property
    def resource(self) -> str:
        """The one that decides most of it."""
        return max(self.deciding, key=lambda name: self.deciding[name], default="")


NOTHING = Bound({}, {})


def _sums(one: Mapping[str, float], other: Mapping[str, float]) -> dict[str, float]:
    return {name: one.get(name, 0.0) + other.get(name, 0.0) for name in {**one, **other}}


def flat(seconds: float, name: str) -> Bound:
    """A time that isn't made of programs."""
    return Bound({name: seconds}, {name: seconds})


def slower(*parts: Bound) -> Bound:
    """What runs at the same time and ends with the slowest."""
    slowest = max(parts, key=lambda part: part.seconds)
    return Bound({name: seconds for part in parts for name, seconds in part.alone.items()}, slowest.deciding)


@dataclass(frozen=True)
class StepCost:
    """Cycles of a multiprocessor for one step of keys of one program, by resource; none for what can't be known."""

    cycles: Mapping[str, float]

    @property
    def most(self) -> float:
        return max(self.cycles.values())


def step_cost(device: Device, tile: TileConfig, compiled: Compiled, *, head_size: int, products: int = 2) -> StepCost:
    """Cost of a step of keys.

    Args:
        device: The device.
        tile: Rows and keys of a step.
        compiled: The kernel.
        head_size: Head size.
        products: Matrix products: 2 for attention, 1 where only scores are made.
    """
    rows, keys = tile.block_m, tile.block_n
    copies = products * keys * head_size * _ELEMENT_BYTES
    cycles = {
        "tensor cores": products * 2 * rows * keys * head_size / device.tensor_flop,
        "shared memory": (_operand_bytes(device, rows, keys, head_size, products) + copies) / SHARED_BYTES,
    }
    if compiled.instructions is not None:
        cycles["instructions"] = compiled.instructions * compiled.warps / SCHEDULERS
    exponentials = rows * keys if compiled.exponentials is None else compiled.exponentials * compiled.warps * 32
    cycles["exponentials"] = exponentials / EXPONENTIALS
    return StepCost(cycles)


def _operand_bytes(device: Device, rows: int, keys: int, head_size: int, products: int) -> int:
    """Shared memory that the products read; probabilities come from registers or tensor memory."""
    if device.capability < 100:
        # Each warp group of 64 rows reads both operands of the first product, and the values.
        groups = -(-rows // 64)
        first, second = groups * (64 + keys) * head_size, groups * keys * head_size
    else:
        # One instruction takes up to 128 rows.
        first, second = (rows + keys) * head_size, keys * head_size
    return _ELEMENT_BYTES * (first + (second if products == 2 else 0))


def launch_bound(
    device: Device,
    cost: StepCost,
    compiled: Compiled,
    steps: np.ndarray,
    *,
    l2_bytes: float,
    hbm_bytes: float,
) -> Bound:
    """The least time of one launch.

    Args:
        device: The device.
        cost: Of one step.
        compiled: The kernel.
        steps: Steps of each program, in launch order; fractions for short ones.
        l2_bytes: Read from L2.
        hbm_bytes: Moved from and to memory at least.
    """
    if not len(steps):
        return NOTHING
    slots = device.multiprocessors * compiled.programs
    total = float(steps.sum())
    per_multiprocessor = device.multiprocessors * device.clock
    alone = {name: total * cycles / per_multiprocessor for name, cycles in cost.cycles.items()}
    alone |= {"L2": l2_bytes / device.l2_bytes_s, "HBM": hbm_bytes / device.hbm_bytes_s}
    alone["latencies"] = len(steps) * _FIXED_CYCLES / (slots * device.clock)
    # Programs that share a multiprocessor share its throughput, and hide each other's latencies.
    busy = _makespan(steps * cost.most * min(compiled.programs, -(-len(steps) // device.multiprocessors)), slots)
    local = max(cost.cycles, key=lambda name: cost.cycles[name])
    ends = {local: busy / device.clock, "L2": alone["L2"], "HBM": alone["HBM"]}
    last = max(ends, key=lambda name: ends[name])
    return Bound(alone, {last: ends[last]})


def _makespan(cycles: np.ndarray, slots: int) -> float:
    """Cycles until the last program ends, each starting in launch order where a slot is free."""
    durations = (cycles + _FIXED_CYCLES).tolist()
    if len(durations) <= slots:
        return max(durations)
    ends = sorted(durations[:slots])
    for duration in durations[slots:]:
        heapq.heapreplace(ends, ends[0] + duration)
    return max(ends)
