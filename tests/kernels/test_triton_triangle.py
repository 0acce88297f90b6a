"""The Triton triangle kernel, interpreted on the CPU, against the fp64 definition."""

import pytest
import torch

from tests.kernels.interpreter import interpreted_bf16_product
from tests.kernels.triton_interpreter import Case, error_of, run_case, tile_rows

pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")


# Query and cache dtypes that vLLM serves on CUDA; "" is the query's.
TABLE_DTYPES = (
    ("float16", ""),
    ("bfloat16", ""),
    ("bfloat16", "float8_e4m3fn"),
    ("bfloat16", "float8_e5m2"),
    ("float8_e4m3fn", "float8_e4m3fn"),
)


def _cases() -> dict[str, Case]:
    cases = {}
    for dtype in ("float16", "bfloat16", "float32"):
        for rows in (1, 63, 113):
            cases[f"{dtype}-len{rows}"] = Case(((0, rows),), n_local=16, q_dtype=dtype)
        cases[f"{dtype}-three-requests"] = Case(((0, 5), (130, 33), (64, 17)), q_dtype=dtype)
    for n_init in (0, 1, 8, 20, 100):
        for n_local in (1, 16, 100, 512):
            cases[f"init{n_init}-local{n_local}"] = Case(((0, 40), (200, 37)), n_init=n_init, n_local=n_local)
    # From every chunk that touches the edge of the sinks, of the window and of a page.
    for position in (7, 8, 9, 15, 16, 17, 63, 64, 65, 71, 72, 73):
        cases[f"chunk-at-{position}"] = Case(((position, 35),), num_kv_heads=1, n_local=64)
    cases["chunks-of-one-prompt"] = Case(((0, 48), (48, 1), (49, 64), (113, 15)), n_local=50)
    cases["window-beyond-the-sequence"] = Case(((0, 70), (20, 50)), n_local=2**31 - 1)
    cases["sinks-beyond-the-sequence"] = Case(((0, 70), (90, 50)), n_init=2**31 - 1, n_local=1)
    for group, heads in ((1, 4), (4, 1), (7, 2), (8, 2)):
        cases[f"gqa{group}"] = Case(((150, 45), (0, 3)), group=group, num_kv_heads=heads)
    cases["mqa130"] = Case(((150, 2),), group=130, num_kv_heads=1)
    for head_size in (16, 48, 64, 80, 96, 128, 256):
        for dtype in ("float16", "float32"):
            name = f"d{head_size}-{dtype}"
            cases[name] = Case(((300, 40),), head_size=head_size, num_kv_heads=1, q_dtype=dtype)
    for block_size in (16, 32, 48, 64, 128, 256, 784):
        for order in ("BHS", "BSH"):
            name = f"page{block_size}-{order}"
            cases[name] = Case(((0, 30), (900, 40)), block_size=block_size, order=order, n_init=20, n_local=130)
    # Every alignment of the unmasked steps with the window, the diagonal and the sinks.
    cases["edges-of-the-window"] = Case(((118, 80),), num_kv_heads=1, group=1, n_local=64, tile_rows=1)
    cases["edges-of-two-rows"] = Case(((118, 80),), num_kv_heads=1, group=1, n_local=65, tile_rows=2)
    cases["last-sink-ends-a-step"] = Case(((63, 32), (200, 9)), n_init=63, n_local=1)
    # Dense rows: alone, beside triangle rows, with their keys split, by less than a tile, with and without sinks.
    cases["dense"] = Case(((0, 40), (130, 33)), dense=(0, 1))
    cases["dense-beside-triangle"] = Case(((64, 20), (300, 40), (0, 9)), dense=(1,), n_local=32)
    cases["dense-without-sinks"] = Case(((300, 40), (300, 40)), dense=(1,), n_init=0, n_local=32)
    for dtype in ("float16", "bfloat16", "float32"):
        for heads, programs in ((1, 16), (2, 32)):
            name = f"split-{dtype}-{heads}-heads"
            cases[name] = Case(
                ((1500, 40), (100, 20)), dense=(0,), programs=programs, num_kv_heads=heads, q_dtype=dtype
            )
    # The last part lies wholly in the future of the tile's first rows.
    cases["split-past-the-first-row"] = Case(((1020, 30),), dense=(0,), programs=3, num_kv_heads=1)
    cases["split-of-several"] = Case(((1100, 9), (2300, 5), (40, 3)), dense=(0, 1, 2), programs=12, num_kv_heads=1)
    cases["split-d256"] = Case(((1200, 20),), dense=(0,), programs=4, num_kv_heads=1, head_size=256)
    cases["split-d96-gqa7"] = Case(((1200, 20),), dense=(0,), programs=4, num_kv_heads=1, head_size=96, group=7)
    cases["split-page64"] = Case(((1200, 20),), dense=(0,), programs=4, num_kv_heads=1, block_size=64)
    for dtype in ("bfloat16", "float8_e4m3fn"):
        cases[f"split-fp8-cache-q-{dtype}"] = Case(
            ((1200, 20), (90, 9)), dense=(0,), programs=4, num_kv_heads=1, q_dtype=dtype, cache_dtype="float8_e4m3fn"
        )
    cases["tile-rows-1"] = Case(((0, 3), (90, 4)), tile_rows=1)
    cases["tile-rows-5"] = Case(((0, 13), (90, 14)), tile_rows=5)
    for cache_dtype in ("float8_e4m3fn", "float8_e5m2"):
        for dtype in ("bfloat16", "float16", "float32", "float8_e4m3fn"):
            name = f"cache-{cache_dtype}-q-{dtype}"
            cases[name] = Case(((0, 20), (150, 33)), q_dtype=dtype, cache_dtype=cache_dtype)
    cases["fp8-without-scales"] = Case(((150, 33),), q_dtype="float8_e4m3fn", cache_dtype="float8_e4m3fn", scales=False)
    for dtype in ("float16", "float32"):
        cases[f"soft-cap-{dtype}"] = Case(((0, 20), (150, 33)), q_dtype=dtype, soft_cap=1.5)
    cases["soft-cap-fp8-cache"] = Case(((150, 33),), q_dtype="bfloat16", cache_dtype="float8_e4m3fn", soft_cap=1.5)
    # Every dtype x head size x GQA group of the table of launch shapes: windows of at least three steps from a position
    # that is no multiple of one, and dense rows whose keys are split.
    for head_size in (64, 96, 128, 256):
        for group in (1, 4, 7, 8):
            for q_dtype, cache_dtype in TABLE_DTYPES:
                name = f"table-d{head_size}-gqa{group}-{q_dtype}-{cache_dtype or 'same'}"
                cases[name] = Case(
                    ((333, 21), (1030, 4)),
                    group=group,
                    num_kv_heads=1,
                    head_size=head_size,
                    n_local=200,
                    dense=(1,),
                    programs=4,
                    q_dtype=q_dtype,
                    cache_dtype=cache_dtype,
                )
    # Offsets beyond 2**31 elements, in each factor of the address arithmetic.
    cases["huge-query-stride"] = Case(((4, 5),), num_kv_heads=1, huge="q")
    cases["huge-output-stride"] = Case(((4, 5),), num_kv_heads=1, huge="out")
    cases["huge-table-stride"] = Case(((4, 5), (9, 6)), num_kv_heads=1, huge="block_table")
    for order in ("BHS", "BSH", "SBH", "HBS"):
        for block_size in (16, 64):
            name = f"huge-cache-stride-{order}-page{block_size}"
            cases[name] = Case(((60, 9),), num_kv_heads=3, group=2, block_size=block_size, order=order, huge="cache")
    return cases


CASES = _cases()


def _is_bulk(name: str) -> bool:
    """Whether a case is one of many alike, of which the drawn cases of the fast tests are a sample."""
    return name.startswith(("table-", "init")) and "-gqa4-" not in name and "local100" not in name


@pytest.mark.tier("C")
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if _is_bulk(name) else []) for name in CASES]
)
def test_matches_the_definition(interpreter, tier, name):
    case = CASES[name]
    num_slots = interpreter.submit(run_case, case).result()
    assert num_slots > 0 or not case.programs, "the case was to split keys"
    tier.case(repr(case), **case.facts())


def test_the_interpreter_multiplies_bf16(interpreter):
    """Without the repair in the test module the interpreter's bf16 products are garbage."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(16, 16, generator=generator).to(torch.bfloat16) for _ in range(2))
    product = interpreter.submit(interpreted_bf16_product, a, b).result()
    exact = a.double() @ b.double()
    assert (product.double() - exact).abs().max() <= torch.finfo(torch.bfloat16).eps * exact.abs().max()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"n_init": -1}, "n_init -1 is outside 0-2147483647"),
        ({"n_local": 0}, "n_local 0 is outside 1-2147483647; the window counts the query itself"),
        ({"scale": 0.0}, "scale 0.0 is not positive"),
        ({"soft_cap": -1.0}, "soft_cap -1.0 is negative; 0 turns it off"),
        ({"tile_rows": 33}, "tile_rows 33 is outside 1-32 for 4 query heads a KV head"),
        ({"tile_rows": 0}, "tile_rows 0 is outside 1-32 for 4 query heads a KV head"),
        ({"q": torch.zeros(2, 8, dtype=torch.float16)}, "q is torch.float16 [2, 8]; expected [num_tokens"),
        ({"q": torch.zeros(11, 8, 64, dtype=torch.float64)}, "q is torch.float64 [11, 8, 64]"),
        ({"q": torch.zeros(11, 8, 128, dtype=torch.float16)[..., ::2]}, "last dimension of q has stride 2; expected 1"),
        ({"q": torch.zeros(11, 7, 64, dtype=torch.float16)}, "out is torch.float16 [11, 8, 64]; expected [11, 7, 64]"),
        ({"q": torch.zeros(11, 8, 64)}, "the cache is torch.float16; expected q's torch.float32 or one of"),
        ({"out": torch.zeros(11, 8, 64, dtype=torch.int32)}, "out is torch.int32 [11, 8, 64]; expected [11, 8, 64] in"),
        ({"k_cache": torch.zeros(2, 2, 16, 32)}, "k_cache is [2, 2, 16, 32]; expected [num_blocks, num_kv_heads"),
        ({"v_cache": torch.zeros(2, 2, 16, 64)}, "v_cache has torch.float32; expected k_cache's torch.float16"),
        ({"v_cache": torch.zeros(2, 2, 16, 64).half()}, "v_cache has strides (2048, 1024, 64, 1); expected k_cache's"),
        ({"block_table": torch.zeros(3, 1)}, "block_table is torch.float32 [3, 1]; expected int32 [rows, blocks]"),
        ({"items": torch.zeros(3, 5, dtype=torch.int32)}, "items is torch.int32 [3, 5]; expected int32 [rows, 8]"),
        ({"items": torch.zeros(8, 3, dtype=torch.int32).T}, "the last dimension of items has stride 3; expected 1"),
        ({"items": torch.zeros(3, 16, dtype=torch.int32)[:, :8]}, "items has strides (16, 1); expected it contiguous"),
        ({"merges": torch.zeros(3, 4)}, "merges is torch.float32 [3, 4]; expected int32 [rows, 4]"),
        ({"merges": torch.zeros(3, 4, dtype=torch.int32)}, "merges has 3 rows, but there is no workspace for partial"),
        ({"k_scale": torch.ones(2)}, "k_scale is torch.float32 [2] on cpu; expected one float32 on cpu"),
        (
            {"v_scale": torch.ones(1, device="meta")},
            "v_scale is torch.float32 [1] on meta; expected one",
        ),
        ({"items": torch.zeros(3, 8, dtype=torch.int32, device="meta")}, "items is on meta, q on cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refuses_with_value_and_limit(interpreter, overrides, message):
    assert message in interpreter.submit(error_of, Case(((0, 5),)), overrides).result()


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "message"),
    [(6, 4, "num_heads 6 is not a multiple of num_kv_heads 4"), (4, 0, "num_heads 4 is not a multiple")],
)
def test_tile_rows_refuses_heads_that_do_not_divide(interpreter, num_heads, num_kv_heads, message):
    with pytest.raises(ValueError, match=message):
        interpreter.submit(tile_rows, num_heads, num_kv_heads, 128, 2).result()


@pytest.mark.parametrize(("head_size", "dtype_size"), [(40, 2), (0, 2), (272, 2), (128, 8)])
def test_tile_rows_refuses_what_has_no_launch_shape(interpreter, head_size, dtype_size):
    with pytest.raises(ValueError, match=r"head_size|query elements"):
        interpreter.submit(tile_rows, 8, 2, head_size, dtype_size).result()


@pytest.mark.parametrize(
    ("heads", "head_size", "dtype_size", "expected"),
    [((32, 8), 128, 2, 32), ((28, 4), 128, 2, 18), ((8, 8), 96, 1, 128), ((32, 8), 256, 2, 32), ((256, 1), 64, 2, 1)],
)
def test_default_tile(interpreter, heads, head_size, dtype_size, expected):
    assert interpreter.submit(tile_rows, *heads, head_size, dtype_size).result() == expected
