"""What a launch must keep to on every GPU: the grid, 32-bit numbers, alignment, and what the work items point at."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from tests.launches.launch import Launch, TensorArgument
from vllm_trimix.plan import Span

MAX_GRID = (2**31 - 1, 65535, 65535)
"""CUDA programming guide, "compute capabilities": programs along x, y and z."""
MAX_THREADS = 1024
INT32_MAX = 2**31 - 1
SHARED_BYTES = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Shared memory that a thread block may use, as it is opted into."""
REGISTERS = 65536
"""Of a multiprocessor, 32 bits each: a thread block's must fit."""
VECTOR_BYTES = 16
"""What a thread loads at once; every row of these arguments must start at a multiple."""
VECTORS = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "partial_ptr", "items_ptr", "merges_ptr")
# Slices of a chunk's rows and of an estimate's sums, of which the kernels assume nothing.
_ANYWHERE = {"estimate_kernel": ("q_ptr",)}
# Keys of the widest step: positions of what is not read lie at most so far past the end.
_WIDEST_STEP = 128


def problems(launch: Launch) -> list[str]:
    """What would be wrong with a launch, a line each."""
    return [f"{launch.kernel}: {line}" for line in (*_of_any(launch), *_of_work(launch))]


def _of_any(launch: Launch) -> Iterator[str]:
    for axis, (programs, limit) in enumerate(zip(launch.grid, MAX_GRID[: len(launch.grid)], strict=True)):
        if not 1 <= programs <= limit:
            yield f"{programs} programs along {'xyz'[axis]}; a GPU takes 1 to {limit}"
    if launch.num_warps * 32 > MAX_THREADS:
        yield f"{launch.num_warps} warps are more than {MAX_THREADS} threads"
    for name, number in launch.numbers.items():
        if isinstance(number, int) and not -INT32_MAX <= number <= INT32_MAX:
            yield f"{name} is {number}, more than 32 bits"
    for name, tensor in launch.tensors.items():
        # A compiled kernel takes an address for a multiple of 16 where this launch's was one.
        if name in launch.aligned and tensor.offset % VECTOR_BYTES:
            yield f"{name} starts {tensor.offset} bytes into its memory, but is compiled as aligned to {VECTOR_BYTES}"
        if name in VECTORS and name not in _ANYWHERE.get(launch.kernel, ()):
            yield from (f"{name}: {line}" for line in _unaligned(name, tensor))
    for name in launch.aligned:
        if launch.numbers.get(name, 0) % 16:
            yield f"{name} is {launch.numbers[name]}, but is compiled as a multiple of 16"


def _unaligned(name: str, tensor: TensorArgument) -> Iterator[str]:
    if tensor.offset % VECTOR_BYTES:
        yield f"starts {tensor.offset} bytes into its memory, no multiple of {VECTOR_BYTES}"
    if not tensor.extent:
        return
    itemsize = 1 if "float8" in tensor.dtype else _itemsize(tensor.dtype)
    for dim, stride in enumerate(tensor.strides[:-1]):
        if tensor.shape[dim] > 1 and stride * itemsize % VECTOR_BYTES:
            yield f"stride {stride} of dimension {dim} is no multiple of {VECTOR_BYTES} bytes"


def _itemsize(dtype: str) -> int:
    return {"bfloat16": 2, "float16": 2, "float32": 4, "int32": 4, "int64": 8, "uint8": 1}[dtype]


def _of_work(launch: Launch) -> Iterator[str]:
    """What the items of a triangle launch, and the merges behind it, point at."""
    tensors, constants = launch.tensors, launch.constants
    for name in ("items_ptr", "merges_ptr"):
        values = tensors[name].values if name in tensors else None
        if values is not None:
            yield from (_of_items if name == "items_ptr" else _of_merges)(launch, values)
    if launch.kernel == "merge_partials_kernel" and launch.grid[1] * constants["BLOCK_ROWS"] != constants["BLOCK_M"]:
        yield f"{launch.grid[1]} programs of {constants['BLOCK_ROWS']} rows for tiles of {constants['BLOCK_M']}"


def _of_items(launch: Launch, items: np.ndarray) -> Iterator[str]:
    request, first, rows, position, begin, end, sinks, slot = items.astype(np.int64).T
    tensors, constants = launch.tensors, launch.constants
    table, queries = tensors["block_table_ptr"], tensors["q_ptr"]
    partials = tensors["partial_ptr"].shape[0] // constants["NUM_KV_HEADS"] if "partial_ptr" in tensors else 0
    # Keys of a lookahead, and of masked lanes, are computed past the end.
    checks: dict[str, Any] = {
        f"programs for {len(items)} items": launch.grid != (len(items) * constants["NUM_KV_HEADS"],),
        f"requests outside {table.shape[0]} rows": (request < 0) | (request >= table.shape[0]),
        f"rows outside {queries.shape[0]}": (first < 0) | (first + rows > queries.shape[0]),
        f"more rows than a tile of {constants['BLOCK_M']}": rows * constants["GROUP"] > constants["BLOCK_M"],
        "positions past 32 bits": np.maximum(end, position + rows) + 2 * _WIDEST_STEP > INT32_MAX,
        "keys that no page holds": end > table.shape[1] * constants["PAGE_SIZE"],
        "no keys": (begin < 0) | ((begin >= end) & (sinks <= 0) & (rows > 0)),
        "keys after the rows": end > position + rows,
        f"slots outside {partials}": slot >= partials,
    }
    yield from (what for what, found in checks.items() if np.any(found))


def _of_merges(launch: Launch, merges: np.ndarray) -> Iterator[str]:
    first, rows, slot, slots = merges.astype(np.int64).T
    partials = launch.tensors["partial_ptr"].shape[0] // launch.constants["NUM_KV_HEADS"]
    out = launch.tensors["out_ptr"]
    checks: dict[str, Any] = {
        f"rows outside {out.shape[0]}": (first < 0) | (first + rows > out.shape[0]),
        f"slots outside {partials}": (slot < 0) | (slots < 0) | (slot + slots > partials),
        # An idle merge has neither.
        "rows without a slot": (slots == 0) & (rows > 0),
    }
    yield from (what for what, found in checks.items() if np.any(found))


def uncovered(launches: list[Launch], spans: list[Span]) -> list[str]:
    """Rows that a layer's launches write never or twice, by their plan's spans."""
    written = []
    for launch in launches:
        for name, columns in (("items_ptr", slice(1, 3)), ("merges_ptr", slice(0, 2))):
            values = launch.tensors[name].values if name in launch.tensors else None
            if values is not None:
                written.append((values if name == "merges_ptr" else values[values[:, 7] < 0])[:, columns])
    due = np.array([(span.first_row, span.num_rows) for span in spans])
    times, times_due = _times(np.concatenate(written)), _times(due)
    same = len(times) == len(times_due) and bool((times == times_due).all())
    return [] if same else ["rows are written never, twice, or are nobody's"]


def _times(ranges: np.ndarray) -> np.ndarray:
    """How often each row is in one of the ranges, [first row, rows] each."""
    first, rows = ranges.astype(np.int64).T
    changes = np.zeros((first + rows).max(initial=0) + 1, dtype=np.int64)
    np.add.at(changes, first, 1)
    np.add.at(changes, first + rows, -1)
    return changes.cumsum()


def unfit(report: dict[str, int], *, capability: int) -> list[str]:
    """What of a compiled kernel a GPU has not."""
    found = []
    if report["shared_bytes"] > SHARED_BYTES[capability]:
        found.append(f"{report['shared_bytes']} bytes of shared memory; a block may use {SHARED_BYTES[capability]}")
    # Registers are handed out to warps in units of 256.
    registers = math.ceil(report["registers"] * 32 / 256) * 256 * report["num_warps"]
    if registers > REGISTERS:
        found.append(f"{registers} registers; a multiprocessor has {REGISTERS}")
    return found


def largest_number(launch: Launch) -> int:
    """The largest 32-bit number of a launch that isn't an address: arguments, programs, and what the items hold."""
    numbers = [abs(number) for number in launch.numbers.values() if isinstance(number, int)]
    for name in ("items_ptr", "merges_ptr"):
        values = launch.tensors[name].values if name in launch.tensors else None
        if values is not None and values.size:
            numbers.append(int(np.abs(values.astype(np.int64)).max()))
    return max(*numbers, math.prod(launch.grid))
