"""Which situations are recorded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from typing import Any

from tests.launches.situations import Situation, covering

HEADS = ((64, 8), (32, 8), (32, 32), (64, 1))
"""Llama-70B, Llama-8B, one KV head for each query head, one for all."""
TP = (1, 2, 4, 8)
HEAD_SIZES = (64, 80, 96, 128, 160, 192, 256)
PAGES = (16, 32, 64, 128, 256, 528, 784)
DTYPES = (("bf16", ""), ("bf16", "fp8"), ("bf16", "fp8q"), ("fp16", ""), ("bf16", "fp8e5"), ("fp32", ""))
CAPABILITIES = (80, 86, 89, 90, 100, 120)
LAYOUTS = ("LBHNC", "LBNHC", "BLHNC", "BLNHC")
TRIANGLE_STEPS = ("whole", "chunk8192", "chunk2048", "middle8192", "mixed128", "tails128")
PATTERN_STEPS = ("chunk8192", "chunk2048", "middle8192", "end16k", "mixed128")
PATTERNS = ("vertical_slash", "a_shape", "block_sparse", "flexprefill", "xattention", "mixed")

_SHAPES: dict[str, Sequence[Any]] = {
    "heads": HEADS,
    "tp": TP,
    "head_size": HEAD_SIZES,
    "page": PAGES,
    "dtypes": DTYPES,
    "capability": CAPABILITIES,
    "layout": LAYOUTS,
}


def of_values(dtypes: tuple[str, str], **values: Any) -> Situation:
    """A situation; GPUs without e4m3 get e5m2."""
    dtype, cache = dtypes
    if values["capability"] < 89 and cache in ("fp8", "fp8q"):
        cache = "fp8e5"
    return Situation(dtype=dtype, cache=cache, **values)


def pairs() -> list[Situation]:
    """Every two values of everything, in steps of the triangle."""
    return [of_values(**row) for row in covering({"step": TRIANGLE_STEPS, **_SHAPES})]


def extremes() -> list[Situation]:
    """The largest of everything at once: programs, strides, tiles and their shared memory."""
    largest = Situation("whole", (32, 32), 1, 256, 784, layout="BLNHC")
    found = [replace(largest, capability=capability) for capability in CAPABILITIES]
    found += [replace(one, heads=heads, page=16) for one in found for heads in ((64, 1), (64, 8))]
    return found + [replace(one, dtype="fp32", head_size=size) for one in found for size in (128, 256)]


def pattern_pairs() -> list[Situation]:
    """Every two values of everything, in steps of dynamic patterns."""
    return [of_values(**row) for row in covering({"pattern": PATTERNS, "step": PATTERN_STEPS, **_SHAPES})]


def pattern_sample() -> list[Situation]:
    """Every pattern and every step once, for the fast tests: one KV head, as eight ranks have."""
    small = Situation(tp=8, pattern="a_shape")
    found = [replace(small, pattern=pattern, step="middle8192") for pattern in PATTERNS if pattern != "mixed"]
    found += [replace(small, step=step, tp=1, cache="fp8") for step in PATTERN_STEPS]
    found.append(replace(small, pattern="mixed", step="end16k", tp=2, head_size=80, page=528))
    return [*found, replace(small, pattern="vertical_slash", step="end16k", tp=1, layout="BLNHC")]


def product_of_shapes() -> list[Situation]:
    """All steps, heads, ranks, head sizes and pages; dtypes, GPUs and layouts in turn."""
    rest = covering({name: _SHAPES[name] for name in ("dtypes", "capability", "layout")})
    shapes = product(TRIANGLE_STEPS, HEADS, TP, HEAD_SIZES, PAGES)
    return [
        of_values(step=step, heads=heads, tp=tp, head_size=size, page=page, **rest[number % len(rest)])
        for number, (step, heads, tp, size, page) in enumerate(shapes)
    ]


def compiled() -> list[Situation]:
    """What is compiled: for each GPU the widest tiles, and other heads, sizes, pages and dtypes in turn."""
    found = []
    patterns = ("flexprefill", "a_shape", "block_sparse")
    for number, capability in enumerate(CAPABILITIES):
        small: dict[str, Any] = {"step": "chunk2048", "capability": capability}
        heads, other = HEADS[number % 4], HEADS[(number + 1) % 4]
        pages = [PAGES[(number + turn) % 7] for turn in range(4)]
        # Of dtypes and head sizes six, the last ones being the widest's.
        dtypes, size, next_size = DTYPES[number], HEAD_SIZES[number], HEAD_SIZES[(number + 3) % 6]
        found += [
            Situation(heads=(64, 1), head_size=256, page=784, dtype="fp32", **small),
            Situation(heads=heads, head_size=256, page=pages[0], **small),
            of_values(dtypes, heads=other, head_size=size, page=pages[1], **small),
            Situation(heads=heads, tp=heads[1], head_size=256, page=pages[2], pattern="vertical_slash", **small),
            of_values(
                DTYPES[(number + 1) % 5],
                heads=other,
                tp=other[1],
                head_size=next_size,
                page=pages[3],
                pattern=patterns[number % 3],
                **small,
            ),
        ]
    return found
