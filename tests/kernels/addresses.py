"""What the 64-bit addressing tests need: tensors of far strides; Triton kernels lowered to TTIR, and mutants of them.

All that imports Triton runs in a worker process, see ``interpreter``.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from tests.kernels.interpreter import strided

# Strides of page, head and token, and KV heads, that no width of a tile can be taken for.
STRIDES = (1000003, 100003, 10007)
NUM_KV_HEADS = 1009
# Wider than any tile: an int32 product with a larger number is no position among keys or rows.
WIDEST_TILE = 256

VARIANTS = (
    "90,128,bf16,bf16",
    "90,96,bf16,bf16",
    "90,256,fp16,fp16,1,784,200",
    "80,64,bf16,fp8e5,7,48",
    "90,128,fp8e4nv,fp8e4nv,4,64,0",
    "90,128,bf16,bf16,merge",
    "90,64,bf16,bf16,7,merge",
    "90,128,bf16,bf16,4,16,sparse-64,columns,band",
    "90,128,bf16,bf16,4,48,sparse-128,plain",
    "90,96,bf16,fp8e5,7,784,sparse-128,columns,band,soft_cap",
    "90,128,bf16,bf16,estimate-stats",
    "90,128,bf16,bf16,estimate-sums",
    "80,256,bf16,fp8e5,7,48,estimate-stats",
    "80,96,fp16,fp16,1,784,estimate-sums",
)


def far(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The same numbers with a stride of 2**30 elements in one dimension; nothing lies between them."""
    order = [dim, *(other for other in range(tensor.ndim) if other != dim)]
    shape = tuple(tensor.shape[place] for place in order)
    placed = strided(shape, tensor.dtype, huge=True).permute(*(order.index(place) for place in range(tensor.ndim)))
    assert placed.stride(dim) * (placed.shape[dim] - 1) >= 2**31, "not far enough: too few rows"
    return placed.copy_(tensor)


def narrow_products(ttir: str) -> list[str]:
    """Operations of a lowered kernel that may wrap an address at 32 bits.

    An int32 product is sound where it makes a position: one factor is a constant, no larger than a tile is wide. An
    address, the product of an index and a stride, is none; nor may 64 bits become 32 again.
    """
    constants: dict[str, int] = {}
    for name, value in re.findall(r"(%[\w#]+) = arith\.constant (?:dense<)?(-?\d+)>? :", ttir):
        constants[name] = int(value)
    found = []
    for line in ttir.splitlines():
        product = re.search(
            r"arith\.(muli|shli) (%[\w#]+), (%[\w#]+)(?: overflow<\w+>)? : (?:tensor<[\dx]+x)?i32\b", line
        )
        factors = [constants.get(name) for name in product.groups()[1:]] if product else []
        is_position = any(factor is not None and abs(factor) <= WIDEST_TILE for factor in factors)
        if (product and (product[1] == "shli" or not is_position)) or re.search(r"trunci .* to (tensor.*x)?i32", line):
            found.append(line.split(" loc(")[0].strip())
    return found


def strides_multiplied(ttir: str) -> set[str]:
    """Strides of a lowered kernel, constants and arguments, that are a factor of some int64 product."""
    found = set()
    values: dict[str, str] = {}
    for name, value in re.findall(r"(%[\w#]+) = arith\.constant (?:dense<)?(-?\d+)>? :", ttir):
        values[name] = value
    for name in re.findall(r"(%stride_\w+): i32", ttir):
        values[name] = name[1:]
    # Widened and spread over a tile a stride has another name.
    for name, source in re.findall(r"(%[\w#]+) = (?:arith\.extsi|tt\.splat) (%[\w#]+) :", ttir):
        if source in values:
            values[name] = values[source]
    for left, right in re.findall(r"arith\.muli (%[\w#]+), (%[\w#]+)[^:]*: (?:tensor<[\dx]+x)?i64\b", ttir):
        found |= {values[name] for name in (left, right) if name in values}
    return found


def expected_strides(ttir: str) -> set[str]:
    """The strides that a lowered kernel must multiply: of its signature, and of the cache if it reads one."""
    own = set(re.findall(r"%(stride_\w+): i32", ttir))
    return own | ({str(stride) for stride in STRIDES} if "%k_ptr" in ttir else set())


class _Lowered(Exception):
    """Carries the TTIR out of the compile tool."""


def lower(variant: str) -> str:
    """A variant of ``triton_compile`` as TTIR, all device functions inlined, with strides that can be told apart."""
    from triton._C.libtriton import ir
    from triton.compiler import make_backend

    from vllm_trimix.kernels import triton_compile

    def compile_to_ttir(source: Any, *, target: Any, options: dict[str, Any]) -> None:
        backend = make_backend(target)
        parsed = backend.parse_options(options)
        context = ir.context()
        ir.load_dialects(context)
        backend.load_dialects(context)
        module = source.make_ir(
            target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context
        )
        stages: dict[str, Any] = {}
        backend.add_stages(stages, parsed, source.language)
        raise _Lowered(str(stages["ttir"](module, {})))

    with (
        mock.patch.object(triton_compile.triton, "compile", compile_to_ttir),
        mock.patch.object(triton_compile, "_cache_stride", return_value=STRIDES),
        mock.patch.object(triton_compile, "_NUM_KV_HEADS", NUM_KV_HEADS),
    ):
        try:
            triton_compile.compile_variant(triton_compile._parse_variant(variant))
        except _Lowered as lowered:
            return str(lowered)
    raise AssertionError("the variant did not reach the compiler")


def device_functions() -> dict[str, Any]:
    """All Triton functions of the kernels' modules, by module and name."""
    import importlib
    from pathlib import Path

    import triton

    import vllm_trimix.kernels

    functions = {}
    for path in sorted(Path(vllm_trimix.kernels.__file__).parent.glob("triton_*.py")):
        module = importlib.import_module(f"vllm_trimix.kernels.{path.stem}")
        for name, value in vars(module).items():
            if isinstance(value, triton.JITFunction) and value.__module__ == module.__name__:
                functions[f"{path.stem}.{name}"] = value
    return functions


def kernels() -> set[str]:
    """The kernels that there are, by name."""
    return {name.split(".")[1] for name in device_functions() if name.endswith("_kernel")}


def widenings() -> list[tuple[str, int, str]]:
    """Every cast to 64 bits in the kernels' source: function, number within it, and its line."""
    found = []
    for name, function in device_functions().items():
        for number, match in enumerate(_CAST.finditer(function.src)):
            start = function.src.rfind("\n", 0, match.start()) + 1
            found.append((name, number, function.src[start : function.src.find("\n", start)].strip()))
    return found


_CAST = re.compile(r"\.to\(tl\.int64\)|tl\.cast\((\w+), tl\.int64\)")


@contextmanager
def _without(name: str, number: int) -> Iterator[None]:
    """One cast to 64 bits left out."""
    function = device_functions()[name]
    source = function.src
    match = list(_CAST.finditer(source))[number]
    function._unsafe_update_src(source[: match.start()] + (match[1] or "") + source[match.end() :])
    try:
        yield
    finally:
        function._unsafe_update_src(source)


def survives(name: str, number: int, variants: Sequence[str]) -> bool:
    """Whether the kernels look sound without a cast."""
    with _without(name, number):
        for variant in variants:
            try:
                if narrow_products(lower(variant)):
                    return False
            except AssertionError:
                raise
            except Exception:
                # Triton itself refuses it, such as a loop whose number changes its type.
                return False
    return True


# What can lie far apart, by kernel: an argument and the dimension of its stride.
TRIANGLE = (("q", 0), ("q", 1), ("out", 0), ("out", 1), ("block_table", 0), ("cache", 0), ("cache", 1), ("cache", 2))
MERGE = (("out", 0), ("out", 1), ("partials", 0))
SPARSE = (*TRIANGLE, ("block_index", 0), ("block_index", 1), ("column_index", 0), ("column_index", 1), ("keys_read", 0))
ESTIMATE = (("q_last", 0), ("q_last", 1), ("block_table", 0), ("cache", 0), ("cache", 1), ("cache", 2))
# Memory orders of a cache whose outermost dimension, the far one, is that of pages, heads or slots.
_ORDERS = ("BHS", "HBS", "SBH")


def run_triangle(name: str, dim: int, *, split: bool = False) -> None:
    """The triangle kernel, or with ``split`` the merge behind it, with one far tensor; in the interpreter's pool."""
    from tests.kernels import triton_interpreter as triangle

    order = _ORDERS[dim] if name == "cache" else "BHS"
    case = triangle.Case(
        ((1030, 4),) if split else ((60, 9), (4, 5)),
        num_kv_heads=2 if split else 3,
        group=2,
        order=order,
        huge="cache" if name == "cache" else "",
        dense=(0,) if split else (),
        programs=8 if split else 0,
    )

    def build() -> Any:
        problem = triangle._build(case)
        arguments = problem.arguments
        if name == "partials":
            _shift_slots(arguments)
        elif name != "cache":
            arguments[name] = far(arguments[name], dim)
        return problem

    with mock.patch.object(triangle, "_build", return_value=build()):
        triangle.run_case(case)


def _shift_slots(arguments: dict[str, Any]) -> None:
    """Partial results from a slot on whose offset is past 2**31 elements."""
    partials = arguments["partials"]
    heads = arguments["k_cache"].shape[1]
    # Slots between are never touched: the workspace is reserved, not filled.
    first = 2**31 // (heads * partials.values[0].numel()) + 1
    rows = first * heads + partials.values.shape[0]
    values = strided((rows // 2**15 + 1,), torch.float32, huge=True)
    whole = values.as_strided((rows, *partials.values.shape[1:]), partials.values.stride(), values.storage_offset())
    stats = torch.full((rows, *partials.stats.shape[1:]), torch.nan)
    arguments["partials"] = type(partials)(whole, stats)
    items, merges = arguments["items"], arguments["merges"]
    items[:, 7] = torch.where(items[:, 7] < 0, items[:, 7], items[:, 7] + first)
    merges[:, 2] += first


def run_sparse(name: str, dim: int) -> None:
    """The sparse kernel with one far tensor; in the interpreter's pool."""
    from tests.kernels import sparse_interpreter as sparse

    order = _ORDERS[dim] if name == "cache" else "BHS"
    case = sparse.SparseCase(
        60, 150, num_columns=20, num_kv_heads=3, order=order, huge="cache" if name == "cache" else "", head_size=16
    )

    def build() -> Any:
        problem = sparse._build(case)
        arguments = problem.arguments
        if name in ("block_index", "column_index"):
            moved = far(getattr(arguments["index"], name), dim)
            arguments["index"] = arguments["index"]._replace(**{name: moved})
        elif name == "keys_read":
            problem.all_read = far(problem.all_read, dim)
            arguments["keys_read"] = problem.all_read[:, :-2]
        elif name != "cache":
            arguments[name] = far(arguments[name], dim)
        return problem

    with mock.patch.object(sparse, "_build", return_value=build()):
        sparse.run_case(case)


def run_estimate(name: str, dim: int) -> None:
    """The estimate's kernel with one far tensor; in the interpreter's pool."""
    from tests.kernels import test_triton_estimate as estimate

    order = _ORDERS[dim] if name == "cache" else "BHS"
    case = estimate.EstimateCase(
        9, 69, num_kv_heads=3, head_size=16, order=order, huge=order if name == "cache" else ""
    )

    def build() -> Any:
        arguments, keys = estimate._build(case)
        if name != "cache":
            arguments[name] = far(arguments[name], dim)
        return arguments, keys

    with mock.patch.object(estimate, "_build", return_value=build()):
        estimate.run_case(case)
