"""Tier E: every address is computed in 64 bits, in the Triton kernels, the compiled CPU kernel and plain PyTorch.

Indices times strides pass 2**31 elements beyond a few thousand pages. Two proofs: no product of the lowered kernels but
positions is 32 bits wide, and launches on tensors whose rows are 2**30 elements apart, in reserved memory, are right.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import pytest
import torch

from tests.budget import assert_within_budget
from tests.kernels import addresses, test_cpp_sparse
from tests.kernels.addresses import far
from tests.kernels.interpreter import compiler_pool
from tests.tiers import Tier
from vllm_trimix.backend.dynamic.cpu_pages import CpuPages
from vllm_trimix.kernels import cpp_sparse, torch_sparse
from vllm_trimix.kernels.reference import gather_pages, masked_attention
from vllm_trimix.kernels.torch_cpu import known_layouts, triangle_prefill
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.plan import Span

pytestmark = pytest.mark.tier("E")

# Offsets into lists whose rows are few numbers wide: a launch of 2**28 items is none.
BOUNDED = ("item_ptr = items_ptr + ", "merge_ptr = merges_ptr + ")


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton lowers kernels."""
    pytest.importorskip("triton", reason="the kernels need Triton (Linux)")
    with compiler_pool() as pool:
        yield pool


@pytest.fixture(scope="module")
def lowered(compiler: ProcessPoolExecutor) -> dict[str, str]:
    """The variants as TTIR."""
    return dict(zip(addresses.VARIANTS, compiler.map(addresses.lower, addresses.VARIANTS), strict=True))


def test_triton_multiplies_addresses_in_64_bits(lowered: dict[str, str], tier: Tier) -> None:
    for variant, ttir in lowered.items():
        assert addresses.narrow_products(ttir) == [], variant
        tier.case("ttir", variant)


def test_the_check_covers_every_kernel_and_stride(compiler: ProcessPoolExecutor, lowered: dict[str, str]) -> None:
    """Each stride is a factor of some 64-bit product, so the check before was about something."""
    missing: dict[str, set[str]] = {}
    for ttir in lowered.values():
        kernel = re.search(r"tt\.func public @(\w+)", ttir)
        assert kernel is not None
        expected = addresses.expected_strides(ttir)
        assert expected
        missing[kernel[1]] = missing.get(kernel[1], expected) & (expected - addresses.strides_multiplied(ttir))
    assert missing == {kernel: set() for kernel in compiler.submit(addresses.kernels).result()}


def test_without_any_one_cast_the_check_fails(compiler: ProcessPoolExecutor, tier: Tier) -> None:
    """Mutants: each cast to 64 bits left out, one at a time."""
    casts = compiler.submit(addresses.widenings).result()
    assert len(casts) >= 20
    step = tier.size(sample=9, full=1)
    for name, number, line in casts[::step]:
        survived = compiler.submit(addresses.survives, name, number, addresses.VARIANTS).result()
        assert survived == line.startswith(BOUNDED), f"{name}: {line}"
        tier.case("ttir mutant", name, number)


LAUNCHES = {
    "triangle": (addresses.run_triangle, addresses.TRIANGLE, {}),
    "merge": (addresses.run_triangle, addresses.MERGE, {"split": True}),
    "sparse": (addresses.run_sparse, addresses.SPARSE, {}),
    "estimate": (addresses.run_estimate, addresses.ESTIMATE, {}),
}


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_interpreted_launches_on_far_tensors(interpreter: Any, tier: Tier, kernel: str) -> None:
    pytest.importorskip("triton", reason="the kernels need Triton (Linux)")
    run, cases, options = LAUNCHES[kernel]
    for name, dim in cases[-tier.size(sample=2, full=len(cases)) :]:
        interpreter.submit(run, name, dim, **options).result()
        tier.case("interpreted", kernel, name, dim)


CPP = (
    ("q", 0),
    ("q", 1),
    ("k", 0),
    ("k", 1),
    ("v", 0),
    ("v", 1),
    ("out", 0),
    ("out", 1),
    ("block_count", 0),
    ("block_index", 0),
    ("block_index", 1),
    ("column_count", 0),
    ("column_index", 0),
    ("column_index", 1),
    ("column_index", 2),
    ("band", 0),
    ("keys_read", 0),
)


def _move(inputs: test_cpp_sparse.Inputs, name: str, dim: int) -> test_cpp_sparse.Inputs:
    """Inputs of which one tensor is far."""
    if name in inputs._fields:
        return inputs._replace(**{name: far(getattr(inputs, name), dim)})
    if name in inputs.index._fields:
        return test_cpp_sparse.listing(inputs, **{name: far(getattr(inputs.index, name), dim)})
    return inputs


@test_cpp_sparse.needs_kernel
@pytest.mark.parametrize(("isa", "dtype"), test_cpp_sparse.KERNELS, ids=lambda value: value)
def test_the_compiled_kernel_on_far_tensors(tier: Tier, isa: str, dtype: str) -> None:
    """Bit by bit what it gives on near ones, which ``test_cpp_sparse`` compares with fp64."""
    test_cpp_sparse.need(isa)
    inputs = test_cpp_sparse.make(
        dtype=dtype, position=30, rows=130, num_heads=8, num_kv_heads=4, head_size=16, band=(5, 40)
    )
    near = torch.empty_like(inputs.q)
    read = torch.empty_like(inputs.index.block_count)
    cpp_sparse.sparse_prefill(*inputs[:3], inputs.index, scale=inputs.scale, out=near, keys_read=read, isa=isa)
    for name, dim in CPP[-tier.size(sample=3, full=len(CPP)) :]:
        moved = _move(inputs, name, dim)
        out = torch.full_like(near, torch.nan)
        counts = torch.full_like(read, -1)
        out, counts = (far(out, dim) if name == "out" else out), (far(counts, dim) if name == "keys_read" else counts)
        cpp_sparse.sparse_prefill(*moved[:3], moved.index, scale=inputs.scale, out=out, keys_read=counts, isa=isa)
        assert torch.equal(out, near), (name, dim)
        assert torch.equal(counts, read), (name, dim)
        tier.case("compiled", isa, dtype, name, dim)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_pytorch_kernels_on_far_tensors(tier: Tier, dtype: str) -> None:
    inputs = test_cpp_sparse.make(dtype=dtype, position=30, rows=130, num_heads=8, num_kv_heads=4, head_size=16)
    near = torch.empty_like(inputs.q)
    torch_sparse.sparse_prefill(*inputs[:3], inputs.index, scale=inputs.scale, out=near)
    cases = [case for case in CPP if case[0] not in ("band", "keys_read")]
    for name, dim in cases[-tier.size(sample=2, full=len(cases)) :]:
        moved = _move(inputs, name, dim)
        out = torch.full_like(near, torch.nan)
        out = far(out, dim) if name == "out" else out
        torch_sparse.sparse_prefill(*moved[:3], moved.index, scale=inputs.scale, out=out)
        assert torch.equal(out, near), (name, dim)
        tier.case("pytorch", "sparse", dtype, name, dim)


@pytest.mark.parametrize("layout", range(4))
@pytest.mark.parametrize("name", ["q", "pages", "heads", "block_table", "out"])
def test_the_cpu_triangle_kernel_on_far_tensors(tier: Tier, name: str, layout: int) -> None:
    """Pages of a large cache, and the gather of dynamic patterns from it."""
    block_size, heads, head_size, span = 16, 4, 32, Span(2, 3, 40, 25)
    generator = torch.Generator().manual_seed(layout)
    tokens = torch.randn(2, 8, heads, block_size, head_size, generator=generator)
    table = torch.zeros(4, 5, dtype=torch.int32)
    table[2] = torch.randperm(7, generator=generator)[:5] + 1
    q = torch.randn(50, 2 * heads, head_size, generator=generator)
    out = torch.full_like(q, torch.nan)
    stored = known_layouts(block_size, head_size)[layout]
    place = stored.tokens(torch.arange(block_size * head_size).view(1, 1, -1)).flatten()
    pages = torch.empty(2, 8, heads, block_size * head_size)
    pages[..., place] = tokens.flatten(3)
    moved: dict[str, Any] = {"q": q, "k": pages[0], "v": pages[1], "block_table": table, "out": out}
    if name in ("pages", "heads"):
        moved |= {kind: far(moved[kind], int(name == "heads")) for kind in ("k", "v")}
    else:
        moved[name] = far(moved[name], 0)
    triangle_prefill(
        moved["q"],
        moved["k"],
        moved["v"],
        moved["block_table"],
        [span],
        k_layout=stored,
        v_layout=stored,
        block_size=block_size,
        n_init=3,
        n_local=20,
        scale=0.2,
        out=moved["out"],
    )
    keys, values = (gather_pages(x, table[2], 65) for x in tokens)
    rows = slice(3, 43)
    mask = Triangle(3, 20, 0).mask(torch.arange(25, 65), torch.arange(65), 65)
    exact = [x.double() for x in (q[rows], keys, values)]
    truth = masked_attention(*exact, mask, scale=0.2)
    plain = masked_attention(q[rows], keys, values, mask, scale=0.2)
    assert_within_budget(moved["out"][rows], truth, plain)
    gathered = CpuPages(moved["k"], moved["v"], moved["block_table"], (stored, stored), block_size, 0.2)
    k, v = gathered.gather(2, 65, 1, 3)
    assert torch.equal(k, keys.transpose(0, 1)[1:4])
    assert torch.equal(v, values.transpose(0, 1)[1:4])
    tier.case("pytorch", "triangle", name, layout)
