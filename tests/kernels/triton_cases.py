"""Cases of the Triton kernels, drawn from a seed and small enough for the interpreter."""

from __future__ import annotations

import random
from typing import Any

from tests.kernels.definition import dice
from tests.kernels.sparse_selection import SparseCase
from tests.kernels.test_triton_estimate import EstimateCase
from tests.kernels.triton_interpreter import Case
from vllm_trimix.patterns.selection import EVERYTHING

# Queries and cache; "" is the query's. fp32 shows the smallest mistakes, and comes most often.
DTYPES = (
    ("float32", ""),
    ("float32", ""),
    ("float32", ""),
    ("float16", ""),
    ("float16", ""),
    ("bfloat16", ""),
    ("bfloat16", ""),
    ("bfloat16", "float8_e4m3fn"),
    ("bfloat16", "float8_e5m2"),
    ("float16", "float8_e4m3fn"),
    ("float8_e4m3fn", "float8_e4m3fn"),
)
# Keys of a step of the triangle kernel, and rows and keys around which something changes in any of them.
EDGES = (15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129)


def _kind(rng: random.Random) -> dict[str, Any]:
    """Dtypes, heads and scales that every kernel has."""
    q_dtype, cache_dtype = rng.choice(DTYPES)
    group = rng.choice((1, 1, 2, 3, 4, 4, 5, 7, 8, 16))
    return {
        "q_dtype": q_dtype,
        "cache_dtype": cache_dtype,
        "group": group,
        "num_kv_heads": rng.choice((1, 1, 2, 3) if group < 5 else (1, 1, 1, 2)),
        "head_size": rng.choice((16, 32, 48, 64, 64, 80, 96, 128, 128, 256)),
        "order": rng.choice(("BHS", "BHS", "BSH")),
    }


def _near(rng: random.Random, *edges: int) -> int:
    return max(0, rng.choice(edges) + rng.choice((-1, 0, 0, 1)))


def draw_triangle(number: int) -> Case:
    """One launch of the triangle kernel: chunks that hide keys, straddle the last rows, or are dense."""
    rng = dice("triton triangle", number)
    kind = _kind(rng)
    n_init = rng.choice((0, 1, 8, 8, 15, 16, 17, 20, 40, 64, 100))
    n_local = rng.choice((1, 2, 16, 31, 32, 33, 50, 63, 64, 65, 100, 129))
    window = n_init + n_local
    spans, dense, last_rows = [], [], []
    splits = rng.random() < 0.15
    for index in range(rng.choice((1, 1, 1, 2, 2, 3))):
        beyond = rng.choice((0, window, window + 64, rng.randint(0, 300), rng.randint(0, 300)))
        position = _near(rng, 0, n_init, n_local, beyond, beyond, rng.choice(EDGES))
        rows = rng.choice((1, 2, 9, 17, 33, rng.randint(1, 60)))
        last = 0
        if rng.random() < 0.5:
            last = min(rows, rng.choice((1, 2, 8, 16, rng.randint(1, 30))))
        if splits and index == 0:
            position, rows = rng.randint(1000, 1400), rng.randint(2, 12)
            last = rng.randint(1, rows)
        spans.append((position, rows))
        last_rows.append(last)
        if rng.random() < 0.1:
            dense.append(index)
    return Case(
        tuple(spans),
        block_size=rng.choice((16, 16, 32, 48, 64, 128, 784)),
        n_init=n_init,
        n_local=n_local,
        dense=tuple(dense),
        last_rows=tuple(last_rows),
        programs=rng.choice((4, 8, 24)) if splits else 0,
        scales=rng.random() < 0.8,
        soft_cap=rng.choice((0.0,) * 9 + (1.5,)),
        tile_rows=rng.choice((0, 0, 0, 1, max(1, 16 // kind["group"]))),
        **kind,
    )


def draw_sparse(number: int) -> SparseCase:
    """One launch of the sparse kernel on a random selection."""
    rng = dice("triton sparse", number)
    kind = _kind(rng)
    block_size = rng.choice((64, 128))
    position = _near(rng, 0, *EDGES, 192, 256, rng.randint(0, 400))
    rows = max(1, _near(rng, 1, 2, 16, 33, 64, rng.randint(1, 100)))
    num_heads = kind["group"] * kind["num_kv_heads"]
    slab = None
    if num_heads > 1 and rng.random() < 0.3:
        first = rng.randrange(num_heads)
        slab = (first, rng.randint(1, num_heads - first))
    band: tuple[tuple[int, int], ...] = ()
    if rng.random() < 0.35:
        everything = (EVERYTHING, EVERYTHING)
        band = tuple(
            rng.choice((everything, (_near(rng, 0, 8, 64, 130), max(1, _near(rng, 1, 16, 64, 65, 100)))))
            for _ in range(rng.randint(1, 3))
        )
    return SparseCase(
        position,
        rows,
        page_size=rng.choice((16, 16, 32, 48, 64, 128, 784)),
        block_size=block_size,
        density=rng.choice((0.0, 0.2, 0.5, 0.9, 1.0)),
        num_columns=rng.choice((0, 0, 1, 31, 63, 64, 65, 130)),
        band=band,
        scales=rng.random() < 0.8,
        soft_cap=rng.choice((0.0,) * 9 + (1.5,)),
        slab=slab,
        **kind,
    )


def draw_estimate(number: int) -> EstimateCase:
    """One estimate of columns and slashes."""
    rng = dice("triton estimate", number)
    kind = _kind(rng)
    num_rows = min(128, max(1, _near(rng, 1, 5, 32, 64, 128, rng.randint(1, 128))))
    num_keys = num_rows + _near(rng, 0, 1, *EDGES, rng.randint(0, 500))
    slab = None
    if kind["num_kv_heads"] > 1 and rng.random() < 0.4:
        first = rng.randrange(kind["num_kv_heads"])
        slab = (first * kind["group"], kind["group"] * rng.randint(1, kind["num_kv_heads"] - first))
    return EstimateCase(num_rows, num_keys, page_size=rng.choice((16, 32, 48, 128)), slab=slab, **kind)
