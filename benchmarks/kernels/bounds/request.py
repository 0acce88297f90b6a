"""A whole prompt of Llama-3.1-8B's shape: what remains beside attention, and how much sooner it can be done."""

from __future__ import annotations

import functools
from dataclasses import dataclass

from benchmarks.kernels.bounds.compiled import SERVED
from benchmarks.kernels.bounds.devices import Device, device_named
from benchmarks.kernels.bounds.layer import PATTERN, chunks_of, dense_bound, predict_layer
from benchmarks.kernels.bounds.sparse import predict_selection, predict_sparse
from vllm_trimix.config.entry import DEFAULT_MIN_PROMPT_LEN
from vllm_trimix.demo.bench_model import SHAPES, ModelShape

MODES = ("stock", "triangle", "triangle+pattern", "floor")
SHAPE = SHAPES["llama-3.1-8b"]
DENSITY = 0.1
PLAN_SECONDS = 0.3e-3
"""Of the host for each step under TRIMIX: what ``benchmarks/gpu/TODO.md`` allows, item 14; as if nothing hid it."""

SHORT_PLAN_SECONDS = 0.05e-3
"""ASSUMED, of a step without triangle rows: planning takes 3 microseconds, the rest keeps track of requests."""

_ELEMENT_BYTES = 2
# Tiles of cuBLAS on Hopper that matmuls of these shapes are likely to get; the better one counts.
_MATMUL_TILES = ((128, 256), (128, 128))
_PEAK_SHAPE = (8192, 8192)


@dataclass(frozen=True)
class RequestPrediction:
    """Seconds of one prompt's prefill, alone on the device.

    Attributes:
        linear: Matrix products of the layers.
        elementwise: Norms, rotary embedding, activation, the write of keys and values.
        dense: Attention of layers and chunks that stay dense.
        triangle: Attention of triangle layers.
        pattern: Attention of layers with a dynamic pattern, its choice included.
        plan: The host's plan of each step.
    """

    linear: float
    elementwise: float
    dense: float = 0.0
    triangle: float = 0.0
    pattern: float = 0.0
    plan: float = 0.0

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.linear + self.elementwise + self.dense + self.triangle + self.pattern + self.plan


@functools.cache
def predict_request(
    device_name: str,
    length: int,
    chunk: int | None,
    mode: str,
    *,
    density: float = DENSITY,
    min_seq_len: int = 0,
    min_prompt_len: int = DEFAULT_MIN_PROMPT_LEN,
    plan_seconds: float = PLAN_SECONDS,
    short_plan_seconds: float = SHORT_PLAN_SECONDS,
    triton: str = SERVED,
) -> RequestPrediction:
    """Prefill of one prompt: dense attention at its published rate, everything of ours at its bound.

    So a ratio to stock is at best. What is left out is left out of all modes: sampling, the engine's own time between
    steps, launches. Shape: Llama-3.1-8B, bf16; half of the layers are triangle layers.

    Args:
        device_name: A key of ``DEVICES``; ``device_for`` finds it.
        length: Prompt tokens.
        chunk: Tokens of a scheduler step; None for the whole prompt in one.
        mode: ``stock``; ``triangle`` in half of the layers; ``triangle+pattern`` with block-sparse, blocks of 128, in
            the other half; ``floor``, whose attention takes no time.
        density: Of the pattern.
        min_seq_len: Chunks that end at fewer tokens stay dense in the pattern's layers, as in the configuration.
        min_prompt_len: Shorter prompts are stock's.
        plan_seconds: Of the host, for each step with triangle rows.
        short_plan_seconds: Of the host, for each step of a prompt below ``min_prompt_len``.
        triton: Version that compiled our kernels.

    Raises:
        ValueError: An unknown device, mode or version, or a density outside (0, 1].
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not known; choose one of {', '.join(MODES)}")
    device = device_named(device_name)
    steps = list(chunks_of(length, chunk))
    linear = sum(_linear_seconds(device, SHAPE, end - start) for start, end in steps)
    elementwise = length * SHAPE.layers * _elementwise_bytes(SHAPE) / device.hbm_bytes_s
    if mode == "floor":
        return RequestPrediction(linear, elementwise)
    dense = predict_layer(device_name, length, chunk, "dense").seconds
    if mode == "stock":
        return RequestPrediction(linear, elementwise, SHAPE.layers * dense)
    if length < min_prompt_len:
        return RequestPrediction(linear, elementwise, SHAPE.layers * dense, plan=len(steps) * short_plan_seconds)
    plan = len(steps) * plan_seconds
    half = SHAPE.layers // 2
    triangle = half * predict_layer(device_name, length, chunk, "trimix_triton", triton=triton).seconds
    if mode == "triangle":
        return RequestPrediction(linear, elementwise, half * dense, triangle, plan=plan)
    left_dense = chosen = 0.0
    for start, end in steps:
        if end < min_seq_len:
            left_dense += dense_bound(device, start, end).seconds
            continue
        body = max(start, min(end, length - PATTERN.last_n))
        chosen += predict_sparse(device_name, start, body, density, triton=triton).seconds
        chosen += predict_selection(device_name, body - start, end).seconds
        if body < end:
            left_dense += dense_bound(device, body, end).seconds
    return RequestPrediction(linear, elementwise, half * left_dense, triangle, half * chosen, plan)


def _linear_seconds(device: Device, shape: ModelShape, rows: int) -> float:
    """Matrix products of all layers for one step; the last token's logits are too few to count."""
    hidden, heads = shape.hidden_size, shape.heads * shape.head_dim
    products = (
        (hidden, heads + 2 * shape.kv_heads * shape.head_dim),
        (heads, hidden),
        (hidden, 2 * shape.intermediate_size),
        (shape.intermediate_size, hidden),
    )
    return shape.layers * sum(_matmul_seconds(device, rows, depth, columns) for depth, columns in products)


def _matmul_seconds(device: Device, rows: int, depth: int, columns: int) -> float:
    """At the measured rate, less what the last wave of tiles leaves idle, or at the memory's rate."""
    flop = 2 * rows * depth * columns
    rate = device.matmul_flop_s * min(1.0, _filled(device, rows, columns) / _filled(device, *_PEAK_SHAPE))
    moved = _ELEMENT_BYTES * (rows * depth + depth * columns + rows * columns)
    return max(flop / rate, moved / device.hbm_bytes_s)


def _filled(device: Device, rows: int, columns: int) -> float:
    """Share of the multiprocessors' time that has a tile in it, and of a tile that has rows in it."""
    shares = []
    for height, width in _MATMUL_TILES:
        tiles = -(-rows // height) * -(-columns // width)
        waves = -(-tiles // device.multiprocessors)
        shares.append(rows * columns / (height * width) / (waves * device.multiprocessors))
    return max(shares)


def _elementwise_bytes(shape: ModelShape) -> int:
    """Moved for one token and layer by vLLM's fused operations."""
    qk = (shape.heads + shape.kv_heads) * shape.head_dim
    kv = 2 * shape.kv_heads * shape.head_dim
    # Two norms read input and residual and write both; rotary reads and writes queries and keys; keys and values go to
    # the cache; the activation reads two halves and writes one.
    return _ELEMENT_BYTES * (2 * 4 * shape.hidden_size + 2 * qk + 2 * kv + 3 * shape.intermediate_size)
