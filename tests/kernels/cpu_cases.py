"""Cases of the CPU kernels, drawn from a seed: whole steps of triangle layers and of layers with dynamic patterns.

Sizes, positions and lengths lie on both sides of every edge that the kernels have: of sinks, window, last rows, dense
length, tiles and pages.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from tests.kernels.cpu_steps import ATTENDS, DynamicStep, TriangleStep
from tests.kernels.definition import GROUPS, MAX_SCORES, dice
from tests.kernels.selected import draw_kernel
from tests.kernels.step import BY_INDEX, Scheduled, Shape
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.base import DynamicPattern
from vllm_trimix.patterns.block_sparse import BlockSparse
from vllm_trimix.patterns.dense import Dense
from vllm_trimix.patterns.flexprefill import FlexPrefill
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.patterns.vertical_slash import VerticalSlash
from vllm_trimix.patterns.xattention import XAttention

HEAD_SIZES = (32, 64, 64, 64, 80, 96, 112, 128, 128, 160, 192, 224, 256)


def draw_shape(rng: random.Random, *, by_vllm: float) -> Shape:
    """Heads and pages; a share of them as vLLM's own operators have them."""
    group = rng.choice(GROUPS)
    num_kv_heads = rng.choice([heads for heads in (1, 1, 2, 2, 3, 4, 8) if heads * group <= 16])
    head_size = rng.choice(HEAD_SIZES)
    dtype = rng.choice(("fp32", "fp32", "bf16", "bf16", "fp16"))
    if rng.random() < by_vllm:
        return Shape(dtype, num_kv_heads, group, head_size, rng.choice((16, 32, 32, 64, 96, 128)), None)
    layouts = (rng.randint(0, BY_INDEX), rng.randint(0, BY_INDEX))
    return Shape(dtype, num_kv_heads, group, head_size, rng.choice((8, 16, 16, 32, 48, 64, 128, 784)), layouts)


def draw_rows(rng: random.Random, shape: Shape, prompt_len: int, last_n: int, edges: tuple[int, ...]) -> Scheduled:
    """Some rows of a prompt: all, a first, middle or last chunk, across the last rows' edge, or generated tokens."""
    body = prompt_len - last_n
    kind = rng.choice(("whole", "chunk", "chunk", "chunk", "straddling", "straddling", "last", "generated"))
    start, end = 0, prompt_len
    if kind == "generated":
        start = prompt_len + rng.choice((-3, 0, 0, 2))
        end = prompt_len + rng.randint(1, 5)
    elif kind == "last":
        start = rng.randint(max(0, min(body, prompt_len - 1)), prompt_len - 1)
    elif kind == "straddling" and last_n > 0 and body > 0:
        start = rng.choice([near for near in (*near_edges(rng, edges), rng.randrange(body)) if 0 <= near < body] or [0])
        end = rng.choice((body + 1, rng.randint(body + 1, prompt_len), prompt_len))
    elif kind == "chunk":
        start, end = sorted(
            (rng.choice(near_edges(rng, edges)), rng.choice((*near_edges(rng, edges), body, prompt_len)))
        )
        start, end = min(max(0, start), prompt_len - 1), min(end, prompt_len)
    start = max(0, start)
    rows = max(1, end - start)
    most = max(1, MAX_SCORES // (shape.num_heads * (start + rows)))
    if rows > most:
        # Its end matters where rows straddle, else its start.
        if kind == "straddling":
            start = max(start, min(body - 1, end - most))
            rows = min(end - start, most + prompt_len - body)
        else:
            rows = most
    return Scheduled(prompt_len, start, rows)


def near_edges(rng: random.Random, edges: tuple[int, ...]) -> list[int]:
    """Numbers beside an edge, or a tile's or page's multiple."""
    beside = rng.choice((-1, 0, 0, 1))
    return [rng.choice(edges) + beside, 64 * rng.randrange(8) + beside, 32 * rng.randrange(12) + beside]


def draw_triangle_step(number: int) -> TriangleStep:
    """One step of a triangle layer."""
    rng = dice("triangle step", number)
    shape = draw_shape(rng, by_vllm=0.4)
    pattern = Triangle(
        n_init=rng.choice((0, 1, 4, 8, 8, 16, 17, 40, 130)),
        n_local=rng.choice((1, 2, 7, 16, 31, 32, 33, 50, 64, 65, 100, 128, 129)),
        last_n=rng.choice((0, 1, 5, 16, 16, 17, 40, 64)),
    )
    window = pattern.n_init + pattern.n_local
    edges = (pattern.n_init, pattern.n_local, window, window + 64, window + 128)
    requests = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3, 4))):
        beyond = rng.choice((1, 2, 63, 64, 65, 128, rng.randint(1, 250), rng.randint(1, 250)))
        lengths = (pattern.dense_len - 1, pattern.dense_len, rng.randint(1, pattern.dense_len), 1)
        prompt_len = rng.choice(lengths) if rng.random() < 0.2 else pattern.dense_len + beyond
        if rng.random() < 0.005:
            prompt_len += rng.randint(1000, 4000)
        requests.append(draw_rows(rng, shape, max(1, prompt_len), pattern.last_n, edges))
    threshold = 0
    if rng.random() < 0.15:
        threshold = rng.choice(requests).prompt_len + rng.choice((-1, 0, 1))
    return TriangleStep(
        shape,
        tuple(requests),
        pattern,
        threshold,
        rng.choice(("", "", *ATTENDS)),
        rng.choice((1, 1, 1, 9)),
        rng.choice((1.0, 1.0, 0.1, 3.0)),
    )


# Each kind with parameters that bite at a few hundred keys.
KINDS: tuple[Callable[[random.Random, Any], DynamicPattern], ...] = (
    lambda rng, size: AShape(
        rng.choice((0, 1, 5, 63, 64, 65)), rng.choice((1, 2, 63, 64, 65, 70, 128, 150)), block_size=size
    ),
    lambda rng, size: VerticalSlash(rng.choice((30, 40, 64, 100)), rng.choice((50, 100, 110, 160)), block_size=size),
    lambda rng, size: BlockSparse(rng.choice((2, 3, 4)), block_size=size),
    lambda rng, size: FlexPrefill(
        rng.choice((0.3, 0.5, 0.9)), rng.choice((0.0, 0.1, 1.0)), block_size=size, min_budget=rng.choice((0, 0, 40))
    ),
    lambda rng, size: XAttention(rng.choice((0.2, 0.5, 0.9)), rng.choice((4, 8, 16)), block_size=size),
    lambda rng, size: Dense(block_size=size),
)


def draw_patterns(rng: random.Random) -> tuple[DynamicPattern, ...]:
    """Of a layer's heads, in turn: one for all, or several of two kinds."""
    block_size = rng.choice((64, 64, 128))
    if rng.random() < 0.6:
        return (rng.choice(KINDS[:-1])(rng, block_size),)
    kinds = rng.sample(KINDS, 2)
    return tuple(rng.choice(kinds)(rng, block_size) for _ in range(rng.choice((2, 3, 4))))


def draw_dynamic_step(number: int) -> DynamicStep:
    """One step of a layer with dynamic patterns."""
    rng = dice("dynamic step", number)
    shape = draw_shape(rng, by_vllm=0.4)
    last_n = rng.choice((0, 1, 5, 16, 40, 64))
    patterns = draw_patterns(rng)
    requests = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        prompt_len = last_n + rng.choice((1, 63, 64, 65, 130, rng.randint(100, 500), rng.randint(250, 700)))
        requests.append(draw_rows(rng, shape, prompt_len, last_n, (64, 128, 256, 320)))
    return DynamicStep(
        shape,
        tuple(requests),
        patterns,
        last_n,
        min_seq_len=rng.choice((0, 0, 0, requests[0].end, requests[0].end + 1)),
        min_rows=rng.choice((1, 1, 16)),
        kernel=draw_kernel(rng, shape.dtype),
        slab=rng.choice((0, 0, 1, 2)),
        in_parts=rng.random() < 0.2,
        sharpness=rng.choice((1.0, 1.0, 2.0)),
    )
