"""The sparse Triton kernel, interpreted on the CPU, against fp64 attention under the selection's own mask."""

from __future__ import annotations

import re

import pytest
import torch

from tests.kernels.interpreter import compiler_pool
from tests.kernels.sparse_interpreter import error_of, run_case, run_idle, specialisations
from tests.kernels.sparse_selection import SparseCase
from vllm_trimix.patterns.selection import EVERYTHING

pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")

# Query and cache dtypes that vLLM serves on CUDA; "" is the query's.
DTYPES = (
    ("float16", ""),
    ("bfloat16", ""),
    ("float32", ""),
    ("bfloat16", "float8_e4m3fn"),
    ("bfloat16", "float8_e5m2"),
    ("float8_e4m3fn", "float8_e4m3fn"),
)
ALL = (EVERYTHING, EVERYTHING)


def _cases() -> dict[str, SparseCase]:
    cases = {}
    # Tiles that start and end anywhere, alone and many, from the start of a prompt and deep in it.
    for block_size in (64, 128):
        for position, rows in (
            (0, 1),
            (0, 63),
            (0, 113),
            (63, 1),
            (63, 2),
            (64, 64),
            (100, 28),
            (257, 130),
            (1000, 90),
        ):
            name = f"block{block_size}-{rows}-rows-at-{position}"
            cases[name] = SparseCase(position, rows, block_size=block_size, num_columns=50, num_kv_heads=1)
    # Columns: fewer and more than a step, more than there are keys, of only some heads, and of heads without blocks.
    for num_columns in (1, 31, 64, 65, 200, 1000):
        cases[f"{num_columns}-columns"] = SparseCase(500, 80, num_columns=num_columns, density=0.2)
    cases["columns-of-no-head-but-one"] = SparseCase(400, 70, columns=(frozenset(), frozenset({3, 399, 400, 420, 469})))
    cases["columns-without-blocks"] = SparseCase(400, 70, num_columns=90, density=0.0)
    cases["columns-within-blocks"] = SparseCase(400, 70, num_columns=90, density=1.0)
    cases["all-blocks"] = SparseCase(0, 300, density=1.0)
    cases["own-block-only"] = SparseCase(300, 100, density=0.0)
    for num_columns in (0, 70):
        for block_size in (64, 128):
            cases[f"band-block{block_size}-{num_columns}-columns"] = SparseCase(
                450,
                150,
                block_size=block_size,
                density=0.8,
                num_columns=num_columns,
                band=(ALL, (8, 100), (0, 1), (200, 64)),
            )
    # Every edge of the steps that a band leaves whole.
    for n_init, n_local in ((0, 65), (63, 128), (64, 127), (65, 129), (128, 1), (EVERYTHING, 1), (0, EVERYTHING)):
        cases[f"band-{n_init}-{n_local}"] = SparseCase(
            300, 100, density=1.0, band=((n_init, n_local),), num_kv_heads=1, group=1
        )
    for group, heads in ((1, 4), (4, 1), (7, 1), (8, 1)):
        cases[f"gqa{group}"] = SparseCase(200, 70, group=group, num_kv_heads=heads, num_columns=40)
    cases["slab-within-a-group"] = SparseCase(200, 70, group=4, num_kv_heads=2, slab=(1, 2), num_columns=40)
    cases["slab-across-groups"] = SparseCase(200, 70, group=3, num_kv_heads=3, slab=(2, 5), band=(ALL, (3, 50)))
    for page_size in (16, 32, 48, 64, 128, 784):
        for order in ("BHS", "BSH"):
            for block_size in (64, 128):
                cases[f"page{page_size}-{order}-block{block_size}"] = SparseCase(
                    700, 70, page_size=page_size, order=order, block_size=block_size, num_columns=70, num_kv_heads=1
                )
    for head_size in (16, 48, 64, 80, 96, 128, 256):
        for block_size in (64, 128):
            for q_dtype, cache_dtype in DTYPES:
                name = f"d{head_size}-block{block_size}-{q_dtype}-{cache_dtype or 'same'}"
                cases[name] = SparseCase(
                    290,
                    # Tiles of 128 rows end in the middle of their first and of their second half.
                    100 if head_size == 256 else 40,
                    group=2,
                    num_kv_heads=1,
                    head_size=head_size,
                    block_size=block_size,
                    num_columns=40,
                    band=(ALL, (8, 70)) if head_size == 96 else (),
                    q_dtype=q_dtype,
                    cache_dtype=cache_dtype,
                )
    cases["fp8-without-scales"] = SparseCase(
        150, 33, q_dtype="float8_e4m3fn", cache_dtype="float8_e4m3fn", scales=False
    )
    for q_dtype, cache_dtype in (("float16", ""), ("float32", ""), ("bfloat16", "float8_e4m3fn")):
        cases[f"soft-cap-{q_dtype}-{cache_dtype or 'same'}"] = SparseCase(
            150, 33, num_columns=20, band=(ALL, (4, 40)), q_dtype=q_dtype, cache_dtype=cache_dtype, soft_cap=1.5
        )
    cases["soft-cap-looking-ahead"] = SparseCase(150, 33, num_columns=20, block_size=128, head_size=128, soft_cap=1.5)
    # Offsets beyond 2**31 elements, in each factor of the address arithmetic.
    for huge in ("q", "out", "block_table"):
        cases[f"huge-{huge}-stride"] = SparseCase(70, 9, num_columns=20, huge=huge)
    for order in ("BHS", "BSH", "SBH", "HBS"):
        cases[f"huge-cache-stride-{order}"] = SparseCase(
            60, 9, num_columns=20, num_kv_heads=3, order=order, huge="cache", head_size=16
        )
    return cases


CASES = _cases()


def _is_bulk(name: str) -> bool:
    """Whether a case is one of many alike, of which the drawn cases of the fast tests are a sample."""
    return re.fullmatch(r"d\d+-block.*|page\d+-.*", name) is not None and not name.startswith(("d128-", "page48-"))


@pytest.mark.tier("C")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if _is_bulk(name) else []) for name in CASES]
)
def test_matches_the_definition(interpreter, tier, name):
    interpreter.submit(run_case, CASES[name]).result()
    tier.case(repr(CASES[name]), **CASES[name].facts())


@pytest.mark.parametrize("band", [(), (ALL, (4, 40))], ids=["no-band", "band"])
@pytest.mark.parametrize("num_columns", [0, 30])
@pytest.mark.parametrize("block_size", [64, 128])
def test_an_idle_launch_writes_nothing_and_finds_the_variant(interpreter, block_size, num_columns, band):
    interpreter.submit(
        run_idle, SparseCase(100, 70, block_size=block_size, num_columns=num_columns, band=band)
    ).result()


def test_serving_never_compiles_again():
    """Lengths, positions, rows, heads, requests and the shapes of an index are in no key of a compiled kernel."""
    kind = {"num_columns": 60, "group": 4, "num_kv_heads": 2}
    # One head and one tile: a count that is a slice at an odd address, strides of one, numbers that are 1 or 16.
    cases = [
        SparseCase(300, 100, **kind),
        SparseCase(0, 1, **kind, slab=(0, 1)),
        SparseCase(1, 1, **kind, slab=(1, 1)),
        SparseCase(321, 1, **kind, slab=(3, 1)),
        SparseCase(16, 16, **kind, slab=(7, 1)),
        SparseCase(1024, 257, **kind, slab=(2, 3)),
        SparseCase(5000, 300, **{**kind, "num_columns": 1}),
    ]
    with compiler_pool() as pool:
        keys = pool.submit(specialisations, cases).result()
    assert len(keys) == len(cases)
    assert set(keys) == {keys[0]}


INT32 = torch.int32


@pytest.mark.parametrize(
    ("overrides", "index", "message"),
    [
        ({"scale": 0.0}, {}, "scale 0.0 is not positive"),
        ({"soft_cap": -1.0}, {}, "soft_cap -1.0 is negative"),
        ({"request": 4}, {}, "request 4 is outside the 4 rows of block_table"),
        ({"request": -1}, {}, "request -1 is outside"),
        ({"first_row": 7}, {}, "rows 7 to 11 are outside the 11 of q"),
        ({"first_row": -1}, {}, "rows -1 to 3 are outside the 11 of q"),
        ({"first_head": 1}, {}, "heads 1 to 4 are outside the 4 of q"),
        ({"keys_read": torch.zeros(4, 2, dtype=INT32)}, {}, "keys_read is torch.int32 [4, 2]; expected int32 [4, 1]"),
        ({"keys_read": torch.zeros(4, 1)}, {}, "keys_read is torch.float32 [4, 1]; expected int32 [4, 1]"),
        ({"block_table": torch.zeros(3, 1)}, {}, "block_table is torch.float32 [3, 1]; expected int32 [rows, blocks]"),
        ({"block_table": torch.zeros(3, 1, dtype=INT32, device="meta")}, {}, "block_table is on meta, q on cpu"),
        ({"v_scale": torch.ones(2)}, {}, "v_scale is torch.float32 [2] on cpu; expected one float32 on cpu"),
        ({"q": torch.zeros(11, 4, 64)}, {}, "the cache is torch.float16; expected q's torch.float32"),
        ({}, {"block_count": torch.zeros(4, 1)}, "block_count is torch.float32 [4, 1]; expected int32"),
        ({}, {"block_index": torch.zeros(3, 1, 2, dtype=INT32)}, "block_index is torch.int32 [3, 1, 2]; expected"),
        (
            {},
            {"block_index": torch.zeros(4, 1, 4, dtype=INT32)[..., ::2]},
            "block_index has strides (4, 4, 2); expected",
        ),
        ({}, {"column_count": torch.zeros(4, 1, dtype=INT32)}, "one of column_count and column_index; expected both"),
        ({}, {"band": torch.zeros(3, 2, dtype=INT32)}, "band has 3 rows; expected one for each of 4 heads"),
        ({}, {"band": torch.zeros(4, 3, dtype=INT32)}, "band is torch.int32 [4, 3]; expected int32 [rows, 2]"),
        ({}, {"band": torch.zeros(4, 2, dtype=INT32, device="meta")}, "band is on meta, q on cpu"),
    ],
)
def test_refuses_with_value_and_limit(interpreter, overrides, index, message):
    assert message in interpreter.submit(error_of, SparseCase(0, 5), overrides, index).result()


def test_refuses_blocks_of_other_sizes(interpreter):
    message = interpreter.submit(error_of, SparseCase(0, 5, block_size=32), {}, {}).result()
    assert message == "the index has blocks of 32; expected one of (64, 128)"
