"""The compiled CPU kernel against fp64 masked softmax, by error budget; every instruction set that runs here."""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.budget import assert_within_budget
from tests.kernels.selected import Inputs, check, make, run, select
from tests.kernels.step import DTYPES
from vllm_trimix.kernels import cpp_sparse
from vllm_trimix.kernels.sparse_index import build_index
from vllm_trimix.patterns.selection import Selection, Tiles

ROOT = Path(__file__).parents[2]
ISAS = ["amx", "avx512_bf16", "avx512", "avx2", "portable", "amx_emulated"]
KERNELS = [
    (isa, dtype) for isa, dtype in itertools.product(ISAS, DTYPES) if dtype == "bf16" or isa not in cpp_sparse.BF16_ONLY
]

needs_kernel = pytest.mark.skipif(not cpp_sparse.is_available(), reason=str(cpp_sparse.unavailable_reason()))


def need(isa: str) -> None:
    if isa not in cpp_sparse.available_isas():
        pytest.skip(f"this CPU can't run {isa}, or its compiler couldn't build it")


def test_it_is_built_where_there_is_a_compiler() -> None:
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler on the PATH")
    if torch.version.cuda:
        pytest.skip("torch is a CUDA build, beside which the CPU kernel isn't built")
    assert cpp_sparse.unavailable_reason() is None
    assert "portable" in cpp_sparse.available_isas()


SHAPES = {
    "one": {"rows": 1},
    "odd": {"rows": 63},
    "late": {"position": 517, "rows": 1},
    "chunk": {"position": 300, "rows": 113},
    "straddling": {"position": 90, "rows": 70},
    "last-partial": {"position": 128, "rows": 200},
    "single-block": {"rows": 64},
    "no-columns": {"position": 200, "rows": 150, "columns": 0},
    "banded": {"position": 300, "rows": 213, "band": (20, 50)},
    "banded-blocks": {"position": 300, "rows": 113, "band": (70, 1), "density": 1.0, "columns": 0},
    "many-columns": {"position": 900, "rows": 100, "columns": 700, "density": 0.05},
    "all-blocks": {"position": 700, "rows": 130, "density": 1.0},
}


@needs_kernel
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("isa", "dtype"), KERNELS, ids=lambda value: value)
def test_shapes(isa: str, dtype: str, shape: str, block_size: int) -> None:
    need(isa)
    check(make(dtype=dtype, block_size=block_size, **SHAPES[shape]), isa)


@needs_kernel
@pytest.mark.parametrize("head_size", [16, 24, 64, 80, 96, 128, 256])
@pytest.mark.parametrize("heads", [(4, 4), (8, 2), (8, 1)], ids=lambda heads: f"{heads[0]}-{heads[1]}")
@pytest.mark.parametrize(("isa", "dtype"), KERNELS, ids=lambda value: value)
def test_heads(isa: str, dtype: str, heads: tuple[int, int], head_size: int) -> None:
    need(isa)
    inputs = make(
        dtype=dtype, position=200, rows=90, num_heads=heads[0], num_kv_heads=heads[1], head_size=head_size, band=(5, 90)
    )
    check(inputs, isa)


@needs_kernel
@pytest.mark.parametrize("block_size", [16, 32, 48, 80, 96, 256])
@pytest.mark.parametrize(("isa", "dtype"), KERNELS, ids=lambda value: value)
def test_block_sizes(isa: str, dtype: str, block_size: int) -> None:
    need(isa)
    inputs = make(dtype=dtype, position=275, rows=301, block_size=block_size, band=(20, 200))
    if "amx" in isa and block_size % 32:
        with pytest.raises(RuntimeError, match=f"multiples of 32, not of {block_size}"):
            run(inputs, isa)
    else:
        check(inputs, isa)


@needs_kernel
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [48, 64])
def test_default_isa(dtype: str, block_size: int) -> None:
    check(make(dtype=dtype, position=275, rows=301, block_size=block_size), None)


@needs_kernel
@pytest.mark.parametrize(("isa", "dtype"), KERNELS, ids=lambda value: value)
def test_everything_selected_is_dense(isa: str, dtype: str) -> None:
    need(isa)
    inputs = make(dtype=dtype, position=190, rows=140, density=2.0, columns=0)
    end = 330
    k, v = (x[:, :end].repeat_interleave(2, 0)[None] for x in (inputs.k, inputs.v))
    q = inputs.q.transpose(0, 1)[None]
    mask = torch.arange(end) <= torch.arange(190, end)[:, None]
    dense, plain = (
        torch.nn.functional.scaled_dot_product_attention(q.to(to), k.to(to), v.to(to), mask)[0].transpose(0, 1)
        for to in (torch.double, q.dtype)
    )
    assert_within_budget(run(inputs, isa), dense, plain)


@needs_kernel
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [3.0, 1e-4, 60.0])
def test_scales(isa: str, scale: float) -> None:
    """Sharp and flat softmax; scores thousands apart underflow to nothing."""
    need(isa)
    check(make(dtype="bf16", position=275, rows=70)._replace(scale=scale), isa)


@needs_kernel
@pytest.mark.parametrize("isa", ISAS)
def test_nan_is_not_hidden(isa: str) -> None:
    """NaN in a key that a row sees reaches that row, and no row before it."""
    need(isa)
    inputs = make(dtype="bf16", position=128, rows=64, density=2.0, columns=0)
    inputs.k[:, 150] = torch.nan
    out = run(inputs, isa)
    assert out[22:].isnan().all()
    assert not run(make(dtype="bf16", position=128, rows=64, density=2.0, columns=0), isa).isnan().any()


@needs_kernel
@pytest.mark.parametrize(("isa", "dtype"), KERNELS, ids=lambda value: value)
def test_extreme_numbers_are_rounded_like_torch(isa: str, dtype: str) -> None:
    """A row that sees one key returns its value bit for bit: denormal, largest, infinite, signed zero."""
    need(isa)
    inputs = make(dtype=dtype, rows=1, columns=0)
    limits = torch.finfo(DTYPES[dtype])
    # bf16 denormals are flushed by the instructions that multiply them.
    tiny = limits.tiny if dtype != "fp16" else limits.smallest_normal / 4
    values = torch.tensor([tiny, -tiny, limits.max, limits.min, torch.inf, -torch.inf, 0.0, 1 + limits.eps])
    inputs.v[:, 0] = values.repeat(8).to(DTYPES[dtype])
    assert torch.equal(run(inputs, isa)[0], inputs.v[:, 0].repeat_interleave(2, 0))


@needs_kernel
@pytest.mark.parametrize(("isa", "dtype"), KERNELS, ids=lambda value: value)
def test_threads_change_no_bit(isa: str, dtype: str) -> None:
    need(isa)
    inputs = make(dtype=dtype, position=333, rows=400, num_heads=8, band=(5, 200))
    one = run(inputs, isa)
    torch.set_num_threads(2)
    for _ in range(3):
        assert torch.equal(run(inputs, isa), one)


@needs_kernel
def test_lists_may_be_strided() -> None:
    inputs = make(dtype="bf16", position=333, rows=200)
    index = inputs.index
    assert index.column_index is not None
    assert index.column_count is not None
    strided = index._replace(
        block_count=index.block_count.T.contiguous().T,
        block_index=index.block_index.transpose(1, 2).contiguous().transpose(1, 2),
        column_count=index.column_count.T.contiguous().T,
        column_index=index.column_index.transpose(0, 2).contiguous().transpose(0, 2),
    )
    keys_read = torch.empty_like(index.block_count).T.contiguous().T
    assert torch.equal(run(inputs._replace(index=strided), None, keys_read=keys_read), run(inputs, None))
    assert torch.equal(keys_read, index.keys_read())


@needs_kernel
def test_many_kv_heads_are_packed_in_turns() -> None:
    """KV heads that don't fit together in the packing budget of 256 MiB are done one after the other, 8 and 1 here."""
    torch.manual_seed(0)
    num_keys, heads = 32768, torch.arange(9)
    tiles = Tiles(64, num_keys - 1, 1)
    blocks = torch.zeros(len(heads), 1, tiles.num_blocks, dtype=torch.bool)
    blocks[:, 0, -1] = True
    blocks[heads, 0, 50 * heads] = True
    k, v = torch.full((2, len(heads), num_keys, 256), torch.nan, dtype=torch.bfloat16)
    for x in (k, v):
        x[:, -64:] = torch.randn(len(heads), 64, 256)
        for head in heads.tolist():
            x[head, 3200 * head : 3200 * head + 64] = torch.randn(64, 256)
    q = torch.randn(1, len(heads), 256).bfloat16()
    together = run(Inputs(q, k, v, Selection(tiles, blocks), build_index(Selection(tiles, blocks)), 1 / 16), None)
    for head in heads.tolist():
        one = slice(head, head + 1)
        selection = Selection(tiles, blocks[one])
        alone = run(Inputs(q[:, one], k[one], v[one], selection, build_index(selection), 1 / 16), None)
        assert torch.equal(together[:, one], alone)


BAD = {
    "q-dim": (lambda i: i._replace(q=i.q[:, :, None]), r"q has shape \[90, 4, 1, 64\]; it must have 3 dimensions"),
    "head-size": (lambda i: i._replace(q=i.q[..., :20]), r"q has shape \[90, 4, 20\].*multiples of 8 from 16 to 256"),
    "k-head-size": (lambda i: i._replace(k=i.k[..., :32]), r"k has shape \[2, 299, 32\], q \[90, 4, 64\]"),
    "v-shape": (lambda i: i._replace(v=i.v[:, 1:]), r"v has shape \[2, 298, 64\], k \[2, 299, 64\]"),
    "heads": (lambda i: i._replace(q=i.q[:, :3]), r"q has shape \[90, 3, 64\], k \[2, 299, 64\]"),
    "keys": (lambda i: i._replace(k=i.k[:, :289], v=i.v[:, :289]), r"positions 200..289 .* k of shape \[2, 289, 64\]"),
    "dtype": (lambda i: i._replace(k=i.k.float()), "k and q have different scalar types"),
    "stride": (lambda i: i._replace(k=i.k.transpose(1, 2).contiguous().transpose(1, 2)), r"\[2, 299, 64\] has stride"),
    "double": (lambda i: i._replace(q=i.q.double()), "must be float32, bfloat16 or float16"),
    "rows": (lambda i: i._replace(q=i.q[1:]), r"q has shape \[89, 4, 64\], the index has 90 rows"),
    "block-count": (
        lambda i: listing(i, block_count=i.index.block_count[:3]),
        r"block_count has shape \[3, 2\]; it must be \[4, 2\]",
    ),
    "block-type": (lambda i: listing(i, block_index=i.index.block_index.long()), "block_index has scalar type"),
    "column-shape": (
        lambda i: listing(i, column_index=i.index.column_index[:, 1:]),
        r"column_index has shape \[4, 1, 40\]; it must be \[4, 2, \*\]",
    ),
    "columns-alone": (lambda i: listing(i, column_count=None), "must be given together"),
    "band": (lambda i: listing(i, band=torch.zeros(4, 3, dtype=torch.int32)), r"band has shape \[4, 3\]"),
    "block-size": (
        lambda i: listing(i, tiles=Tiles(512, 200, 90)),
        "block_size is 512; it must be a multiple of 16 from 16 to 256",
    ),
    "too-many": (lambda i: listing(i, block_count=i.index.block_count + 9), "block_count is .*, outside 1..5"),
    "later-block": (lambda i: listing(i, block_index=i.index.block_index + 1), "block_index holds"),
    "negative": (lambda i: listing(i, block_index=i.index.block_index - 9), "block_index holds -"),
    "own-block": (lambda i: listing(i, block_count=(i.index.block_count - 1).clamp(min=1)), "not with the tile's own"),
    "twice": (lambda i: listing(i, block_index=torch.zeros_like(i.index.block_index)), "blocks must ascend"),
    "later-column": (lambda i: listing(i, column_index=i.index.column_index + 300), "column_index holds"),
}


def listing(inputs: Inputs, **changes: object) -> Inputs:
    return inputs._replace(index=inputs.index._replace(**changes))


@needs_kernel
@pytest.mark.parametrize("what", BAD)
def test_bad_inputs_are_named(what: str) -> None:
    damage, message = BAD[what]
    inputs = damage(make(dtype="bf16", position=200, rows=90))
    out = torch.empty(inputs.q.shape, dtype=inputs.q.dtype)
    with pytest.raises(RuntimeError, match=message):
        cpp_sparse.sparse_prefill(inputs.q, inputs.k, inputs.v, inputs.index, scale=1.0, out=out)


@needs_kernel
def test_bad_outputs_are_named() -> None:
    q, k, v, _, index, scale = make(dtype="bf16", position=200, rows=90)
    with pytest.raises(RuntimeError, match=r"out has shape \[90, 4, 32\], q \[90, 4, 64\]"):
        cpp_sparse.sparse_prefill(q, k, v, index, scale=scale, out=torch.empty_like(q[..., :32]))
    counts = torch.empty(4, 3, dtype=torch.int32)
    with pytest.raises(RuntimeError, match=r"keys_read has shape \[4, 3\]; it must be \[4, 2\]"):
        cpp_sparse.sparse_prefill(q, k, v, index, scale=scale, out=torch.empty_like(q), keys_read=counts)
    with pytest.raises(RuntimeError, match="scale is 0; it must be above 0"):
        cpp_sparse.sparse_prefill(q, k, v, index, scale=0.0, out=torch.empty_like(q))


@needs_kernel
def test_a_forced_isa_never_falls_back() -> None:
    with pytest.raises(RuntimeError, match=r"isa 'sse9' can't run here; there are .*portable"):
        run(make(dtype="bf16"), "sse9")
    for isa in set(cpp_sparse.BF16_ONLY) & set(cpp_sparse.available_isas()):
        with pytest.raises(RuntimeError, match=f"isa '{isa}' takes bfloat16 only"):
            run(make(dtype="fp32"), isa)


@needs_kernel
def test_fake_kernel() -> None:
    """Shapes alone go through the operator, so that a graph can hold it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    inputs = make(dtype="bf16", rows=90)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        q, k, v = (mode.from_tensor(x) for x in (inputs.q, inputs.k, inputs.v))
        cpp_sparse.sparse_prefill(q, k, v, inputs.index, scale=1.0, out=torch.empty_like(q))


@needs_kernel
def test_time_falls_with_density() -> None:
    tiles = Tiles(64, 6144, 512)
    dense, sparse = (build_index(select(tiles, num_heads=2, density=d, columns=0)) for d in (2.0, 0.1))
    q = torch.randn(512, 2, 64).bfloat16()
    k, v = torch.randn(2, 1, 6656, 64).bfloat16()
    out = torch.empty_like(q)
    seconds: dict[int, float] = {}
    for _ in range(5):
        for number, index in enumerate((dense, sparse)):
            start = time.perf_counter()
            cpp_sparse.sparse_prefill(q, k, v, index, scale=0.1, out=out)
            seconds[number] = min(seconds.get(number, 9e9), time.perf_counter() - start)
    assert seconds[1] <= 0.5 * seconds[0]


@needs_kernel
def test_instructions_stay_in_their_translation_units(tmp_path: Path) -> None:
    """Objects with -m flags share no symbol that the linker may merge with another's, and run nothing when loaded."""
    if not (shutil.which("g++") and shutil.which("nm")):
        pytest.skip("no g++ or no nm on the PATH")
    if "avx2" not in cpp_sparse.available_isas():
        pytest.skip("this CPU has no AVX2; only one translation unit per ISA matters")
    flags = "import setup; print(*(f'{s} {\" \".join(f)}' for s, f in setup.ISA_FLAGS.items()), sep='\\n')"
    code = f"import setuptools; setuptools.setup = lambda **_: None; {flags}"
    lines = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    sources = [line.split() for line in lines.splitlines() if line.startswith("csrc/")]
    assert len(sources) >= 5
    for source, *options in sources:
        target = tmp_path / f"{Path(source).stem}.o"
        command = [
            "g++",
            "-std=c++17",
            "-O0",
            "-fPIC",
            "-fno-exceptions",
            "-Wno-psabi",
            *options,
            "-c",
            source,
            "-o",
            str(target),
        ]
        subprocess.run(command, cwd=ROOT, check=True)
        symbols = subprocess.run(["nm", str(target)], capture_output=True, text=True, check=True).stdout.splitlines()
        shared = [line for line in symbols if line.split()[-2] in "WVuTBD" and "Kernel" not in line]
        assert shared == []
        assert not [line for line in symbols if "GLOBAL__sub_I" in line]


def test_import_is_light_and_needs_no_kernel(tmp_path: Path) -> None:
    code = (
        "from pathlib import Path; from vllm_trimix.kernels import cpp_sparse; import torch;"
        "assert not hasattr(torch.ops.vllm_trimix, 'sparse_prefill'), 'loaded at import';"
        f"cpp_sparse.LIBRARY = Path({str(tmp_path / 'absent.so')!r});"
        "assert not cpp_sparse.is_available() and cpp_sparse.available_isas() == [];"
        "print(cpp_sparse.unavailable_reason())"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "absent.so was not built" in result.stdout
