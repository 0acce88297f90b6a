"""Bounds of one triangle layer of Llama-3.1-8B: our kernel from the work items that it would launch, the other ways."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator

import numpy as np

from benchmarks.kernels.bounds.bound import NOTHING, Bound, flat, launch_bound, slower, step_cost
from benchmarks.kernels.bounds.compiled import SERVED, compiled
from benchmarks.kernels.bounds.devices import Device, device_named
from vllm_trimix.backend.triangle.triton_prefill import TritonPrefill
from vllm_trimix.kernels.triton_configs import config_for, tile_rows_for
from vllm_trimix.kernels.work_items import DENSE, Work, cut_work
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Plan, Request, Span, build_plan

NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE = 32, 8, 128
PATTERN = Triangle(n_init=8, n_local=512, last_n=128)
WAYS = ("dense", "trimix_triton", "trimix_triton_stock_tail", "trimix_flash_merge", "trimix_flash_pages", "last_rows")
"""``dense``, contenders of ``benchmarks.kernels.contenders`` by name, and ``trimix_triton``'s last rows alone."""

_PAIR_FLOP = 4 * NUM_HEADS * HEAD_SIZE
ROW_BYTES = 2 * NUM_HEADS * HEAD_SIZE
"""Of one token's queries, or outputs, in 16 bits."""
KEY_BYTES = 2 * 2 * NUM_KV_HEADS * HEAD_SIZE
"""Of one token's keys and values."""
_PROGRAMS_PER_MULTIPROCESSOR = 4  # As ``vllm_trimix.backend.triangle.triton_prefill``.
_SINK_STEP = 16  # Keys of the short step.
# FlashAttention 3 with a paged cache, causal or windowed, head size 128: rows of a tile, heads of a KV head packed, and
# keys of a step (hopper/tile_size.h of its source).
_FLASH_ROWS, _FLASH_KEYS = 128, 128
_PAGE = 16
_PAGES_TILE = 128  # As ``vllm_trimix.backend.triangle.flash_pages``.


def chunks_of(length: int, chunk: int | None) -> Iterator[tuple[int, int]]:
    """[start, end) of each step of a prompt; None is one step."""
    size = chunk or length
    for start in range(0, length, size):
        yield start, min(length, start + size)


def dense_pairs(start: int, end: int) -> int:
    """(query, key) pairs of causal attention for the rows [start, end)."""
    return (end * (end + 1) - start * (start + 1)) // 2


def dense_bound(device: Device, start: int, end: int) -> Bound:
    """Dense attention of the rows [start, end), at the published rate or the memory's."""
    moved = 2 * (end - start) * ROW_BYTES + end * KEY_BYTES
    return slower(
        flat(dense_pairs(start, end) * _PAIR_FLOP / device.dense_flop_s, device.dense_kernel),
        flat(moved / device.hbm_bytes_s, "HBM"),
    )


@functools.cache
def predict_layer(
    device_name: str, length: int, chunk: int | None, way: str = "trimix_triton", *, triton: str = SERVED
) -> Bound:
    """The least time of one triangle layer for a whole prompt, alone in its batch.

    Llama-3.1-8B's heads (32 query, 8 KV, size 128), bf16, pages of 16 tokens; ``n_init`` 8, ``n_local`` 512, ``last_n``
    128. A measurement may be below it only as far as the device's numbers are: a higher clock, a faster L2. What is
    missing from it: waits that the resources don't explain, bank conflicts, and on Blackwell instructions and
    tensor-memory traffic.

    Args:
        device_name: A key of ``DEVICES``; ``device_for`` finds it.
        length: Prompt tokens.
        chunk: Tokens of a scheduler step; None for the whole prompt in one.
        way: One of ``WAYS``.
        triton: Version that compiled our kernel.

    Raises:
        ValueError: An unknown device, way or version, or a way that the device lacks.
    """
    if way not in WAYS:
        raise ValueError(f"way {way!r} is not known; choose one of {', '.join(WAYS)}")
    device = device_named(device_name)
    if "flash" in way and device.capability != 90:
        raise ValueError(f"way {way!r} is known for Hopper's FlashAttention 3; {device_name} runs another")
    total = NOTHING
    for start, end in chunks_of(length, chunk):
        if way == "dense":
            total += dense_bound(device, start, end)
        elif way == "last_rows":
            total += _ours(device, Plan(tails=_plan(length, start, end).tails), triton=triton)
        else:
            bodies: dict[str, Callable[[Device, Plan], Bound]] = {
                "trimix_triton": functools.partial(_ours, triton=triton),
                "trimix_triton_stock_tail": functools.partial(_ours, triton=triton),
                "trimix_flash_merge": _flash_merge,
                "trimix_flash_pages": _flash_pages,
            }
            plan = _plan(length, start, end, max_tail_rows=TritonPrefill.max_tail_rows if way == WAYS[1] else 0)
            total += bodies[way](device, plan)
            for span in plan.dense:
                total += dense_bound(device, span.position, span.position + span.num_rows)
    return total


def _plan(length: int, start: int, end: int, *, max_tail_rows: int = TritonPrefill.max_tail_rows) -> Plan:
    return build_plan(
        [0, end - start],
        [end],
        [Request(length)],
        pattern=PATTERN,
        min_prompt_len=0,
        max_tail_rows=max_tail_rows,
    )


def _ours(device: Device, plan: Plan, *, triton: str) -> Bound:
    """One launch of the triangle kernel, and the merge of its partial results."""
    tile = config_for(HEAD_SIZE, 2, 2, device.capability)
    kernel = compiled("prefill", device.capability, triton=triton)
    work = cut_work(
        plan.triangle,
        plan.tails,
        tile_rows=tile_rows_for(NUM_HEADS, NUM_KV_HEADS, HEAD_SIZE, 2, device.capability),
        n_init=PATTERN.n_init,
        n_local=PATTERN.n_local,
        num_kv_heads=NUM_KV_HEADS,
        target_programs=_PROGRAMS_PER_MULTIPROCESSOR * device.multiprocessors,
    )
    steps = _steps(work, tile.block_n)
    rows = sum(span.num_rows for span in [*plan.triangle, *plan.tails])
    # Fp32 sums of each part, written and read again.
    partials = 2 * 4 * work.num_slots * NUM_KV_HEADS * tile.block_m * HEAD_SIZE
    step_bytes = 2 * 2 * tile.block_n * HEAD_SIZE
    return launch_bound(
        device,
        step_cost(device, tile, kernel, head_size=HEAD_SIZE),
        kernel,
        steps,
        l2_bytes=float(steps.sum()) * step_bytes + rows * ROW_BYTES + partials / 2,
        hbm_bytes=2 * rows * ROW_BYTES + _keys_seen(plan) * KEY_BYTES + partials,
    )


def _steps(work: Work, block_n: int) -> np.ndarray:
    """Steps of each program: an item's, for every KV head; the sinks' short step is a part of one."""
    items = work.items.astype(np.int64)
    first = items[:, 4] // block_n * block_n
    steps = np.ceil((items[:, 5] - first).clip(0) / block_n) + (items[:, 6] != DENSE) * _SINK_STEP / block_n
    return np.repeat(steps, NUM_KV_HEADS)


def _keys_seen(plan: Plan) -> int:
    """Keys that some row sees, each once: what must come from memory."""
    if plan.tails:
        return max(span.position + span.num_rows for span in plan.tails)
    return sum(span.num_rows + min(span.position, PATTERN.n_local + PATTERN.n_init) for span in plan.triangle)


def _flash_launch(device: Device, keys: float, span: Span, *, reads: int = 1, writes: int = 1) -> Bound:
    """A launch whose rows see ``keys`` keys each as executed, at FlashAttention's published rate or the memory's."""
    return slower(
        flat(span.num_rows * keys * _PAIR_FLOP / device.dense_flop_s, device.dense_kernel),
        flat((reads + writes) * span.num_rows * ROW_BYTES / device.hbm_bytes_s, "HBM"),
    )


def _flash_merge(device: Device, plan: Plan) -> Bound:
    """Window, sinks, and the merge, which reads both results and writes one."""
    total = NOTHING
    for span in plan.triangle:
        total += _flash_launch(device, _window_keys(span, PATTERN.n_local), span)
        total += _flash_launch(device, _FLASH_KEYS, span)
        total += flat(3 * span.num_rows * ROW_BYTES / device.hbm_bytes_s, "HBM")
    return total


def _window_keys(span: Span, window: int) -> float:
    """Keys of the steps that a row's tile runs through, on average."""
    tokens = _FLASH_ROWS * NUM_KV_HEADS // NUM_HEADS
    first = np.arange(span.position, span.position + span.num_rows, tokens)
    begin = (first - window + 1).clip(0) // _FLASH_KEYS
    end = -(-(first + tokens) // _FLASH_KEYS)
    return float((end - begin).mean()) * _FLASH_KEYS


def _flash_pages(device: Device, plan: Plan) -> Bound:
    """Tiles as requests: sink pages and window pages, causal from the end."""
    tokens = _FLASH_ROWS * NUM_KV_HEADS // NUM_HEADS
    total = NOTHING
    for span in plan.triangle:
        first = np.arange(span.position, span.position + span.num_rows, tokens)
        tile = first // _PAGES_TILE * _PAGES_TILE
        begin = (tile - PATTERN.n_local + 1).clip(0) // _PAGE * _PAGE
        sinks = -(-PATTERN.n_init // _PAGE) * _PAGE
        keys = first + tokens - begin + np.minimum(sinks, begin)
        total += _flash_launch(device, float(np.ceil(keys / _FLASH_KEYS).mean()) * _FLASH_KEYS, span)
    return total
