"""Cases of the Triton kernels: those of the interpreter's tests, larger ones, and the order in which they matter."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import zip_longest
from typing import Any, Protocol

import torch

from tests.kernels import sparse_interpreter, test_triton_estimate, test_triton_sparse, test_triton_triangle
from tests.kernels.answer import Answer
from tests.kernels.sparse_interpreter import SparseCase
from tests.kernels.test_triton_estimate import EstimateCase
from tests.kernels.triton_interpreter import Case
from tests.kernels.triton_interpreter import Launch as TriangleLaunch
from vllm_trimix.patterns.selection import EVERYTHING

_HEAD_SIZES, _PAGES, _GROUPS = (64, 96, 128, 256), (16, 32, 64, 128), (1, 4, 7, 8)
_DTYPES = (("bfloat16", ""), ("float16", ""), ("bfloat16", "float8_e4m3fn"), ("float16", "float8_e5m2"))
_TIMES_TWO = (0, 2, 3, 1)  # In the field of four elements, where + is ^.

# Llama-3.1-8B's attention, on two of its KV heads; rows of every rule in one launch, the last ones with their keys
# split and merged.
_LLAMA: dict[str, Any] = {"q_dtype": "bfloat16", "head_size": 128, "group": 4, "num_kv_heads": 2}
_SERVED: dict[str, Any] = {**_LLAMA, "n_local": 512, "spans": ((1900, 200),), "last_rows": (128,), "programs": 32}
_FP8 = "float8_e4m3fn"
_ALL = (EVERYTHING, EVERYTHING)
_SPARSE: dict[str, Any] = {
    **_LLAMA,
    "position": 900,
    "rows": 140,
    "num_columns": 100,
    "band": (_ALL, (8, 512)),
}


class Launch(Protocol):
    """A case on a device: ``Launch`` of each of the three kernels' test modules."""

    case: Any
    arguments: dict[str, Any]

    def fill(self, value: float) -> None: ...
    def run(self) -> None: ...
    def outputs(self) -> list[torch.Tensor]: ...
    def answer(self) -> Answer: ...
    def reference(self) -> list[torch.Tensor]: ...


def prepare_launch(case: Any, device: str) -> Launch:
    """Builds a case's tensors on a device."""
    kinds: dict[type, Any] = {
        Case: TriangleLaunch,
        SparseCase: sparse_interpreter.Launch,
        EstimateCase: test_triton_estimate.Launch,
    }
    return kinds[type(case)](case, device)


def kernel_of(case: Any) -> str:
    """Which kernel a case launches: ``triangle``, ``sparse`` or ``estimate``."""
    return {Case: "triangle", SparseCase: "sparse", EstimateCase: "estimate"}[type(case)]


def size_of(case: Any) -> int:
    """Products that a dense run of it would take: the smallest failing case is the easiest to follow."""
    if isinstance(case, Case):
        pairs = sum(rows * (position + rows) for position, rows in case.spans)
    elif isinstance(case, SparseCase):
        pairs = case.rows * (case.position + case.rows)
    else:
        pairs = case.num_rows * case.num_keys
    return pairs * case.group * case.num_kv_heads * case.head_size


def pairs() -> dict[str, Case]:
    """Sixteen cases in which every two of head size, page, GQA group and dtypes meet (an orthogonal array)."""
    found = {}
    for i, head_size in enumerate(_HEAD_SIZES):
        for j, page in enumerate(_PAGES):
            group = _GROUPS[i ^ j]
            q_dtype, cache_dtype = _DTYPES[i ^ _TIMES_TWO[j]]
            name = f"d{head_size}-page{page}-gqa{group}-{q_dtype}-{cache_dtype or 'same'}"
            found[name] = Case(
                ((0, 70), (5000, 300)),
                group=group,
                head_size=head_size,
                block_size=page,
                n_local=512,
                q_dtype=q_dtype,
                cache_dtype=cache_dtype,
            )
    return found


def first_cases() -> dict[str, Any]:
    """By value: what most users run comes first, then what changes one thing of it.

    Every case has shuffled pages in shuffled rows of the table, and NaN in all slots that no row may read.
    """
    cases: dict[str, Any] = {
        "served-band": Case(((0, 200), (1500, 300)), n_local=512, **_LLAMA),
        "served-last-rows": Case(**_SERVED),
        "served-sparse-64": SparseCase(block_size=64, **_SPARSE),
        "served-sparse-128": SparseCase(block_size=128, **_SPARSE),
        "served-estimate": EstimateCase(64, 2100, **_LLAMA),
        "served-fp8-cache": Case(cache_dtype=_FP8, **_SERVED),
        "served-fp8": Case(cache_dtype=_FP8, **_SERVED | {"q_dtype": _FP8}),
        # The window starts far behind freed pages; a decode-sized chunk; two requests beside it.
        "served-freed-pages": Case(((5000, 70), (640, 1), (0, 9)), n_local=512, **_LLAMA),
        "served-head-64": Case(**_SERVED | {"head_size": 64}),
        "served-head-256": Case(**_SERVED | {"head_size": 256, "num_kv_heads": 1}),
        "served-gqa1": Case(**_SERVED | {"group": 1, "num_kv_heads": 3}),
        "served-gqa7": Case(**_SERVED | {"group": 7, "num_kv_heads": 1}),
        "served-gqa8": Case(**_SERVED | {"group": 8, "num_kv_heads": 1}),
        "served-fp16": Case(**_SERVED | {"q_dtype": "float16"}),
        "served-nhd": Case(order="BSH", **_SERVED),
        "served-page-64": Case(block_size=64, **_SERVED),
        "served-sparse-64-fp8-cache": SparseCase(block_size=64, cache_dtype=_FP8, **_SPARSE),
        "served-sparse-128-fp8": SparseCase(block_size=128, cache_dtype=_FP8, **_SPARSE | {"q_dtype": _FP8}),
        "served-estimate-fp8-cache": EstimateCase(64, 2100, cache_dtype=_FP8, **_LLAMA),
        "served-whole-prompts-dense": Case(((0, 150), (1100, 30)), dense=(0, 1), programs=24, **_LLAMA),
        # The first twenty are what a run must have seen.
        "served-sparse-blocks-only": SparseCase(block_size=128, **_SPARSE | {"num_columns": 0, "band": ()}),
        "served-sparse-head-64": SparseCase(block_size=64, **_SPARSE | {"head_size": 64}),
        "served-head-64-fp8": Case(cache_dtype=_FP8, **_SERVED | {"head_size": 64, "q_dtype": _FP8}),
        "served-head-256-fp8-cache": Case(cache_dtype=_FP8, **_SERVED | {"head_size": 256, "num_kv_heads": 1}),
        "served-head-96": Case(**_SERVED | {"head_size": 96}),
        "served-e5m2-cache": Case(cache_dtype="float8_e5m2", **_SERVED),
        "served-page-784": Case(block_size=784, **_SERVED),
        "served-soft-cap": Case(soft_cap=30.0, **_SERVED),
        "served-without-sinks": Case(n_init=0, **_SERVED),
        "served-a-shape": Case(**_SERVED | {"last_rows": (), "programs": 0}),
        "served-estimate-128-rows": EstimateCase(128, 1500, **_LLAMA),
        "served-sparse-nhd": SparseCase(block_size=128, order="BSH", **_SPARSE),
    }
    return cases


MUST_RUN = 20
"""So many of ``first_cases`` a ranked run must have seen."""
SMALLEST = ("bfloat16-len63", "sparse-64-columns", "estimate-64-rows-65-keys")
"""One small case of each kernel."""


def tested_cases() -> dict[str, Any]:
    """The cases of the interpreter's tests, and the larger ones."""
    cases: dict[str, Any] = {**test_triton_triangle.CASES, **pairs()}
    cases |= {f"sparse-{name}": case for name, case in test_triton_sparse.CASES.items()}
    cases |= {f"estimate-{name}": case for name, case in test_triton_estimate.CASES.items()}
    return cases


def all_cases() -> dict[str, Any]:
    """Every case there is, by name."""
    return first_cases() | tested_cases()


def ranked() -> dict[str, Any]:
    """All cases by value: ``first_cases``, then the others with the kernels in turn, fp32, which nobody serves, last.

    Those whose tensors fill a device's memory are not among them: other stages share it.
    """
    rest = {name: case for name, case in tested_cases().items() if not case.huge}
    cases = first_cases()
    for served in (True, False):
        queues: list[Iterable[str]] = [
            [name for name, case in rest.items() if kernel_of(case) == kernel and (case.q_dtype != "float32") is served]
            for kernel in ("triangle", "sparse", "estimate")
        ]
        cases |= {name: rest[name] for names in zip_longest(*queues) for name in names if name is not None}
    return cases


def choose(names: Iterable[str] | str | None) -> dict[str, Any]:
    """The cases that a stage's settings name.

    Args:
        names: ``ranked``; names of cases; None for those of the tests.

    Raises:
        ValueError: There is no such case.
    """
    if names is None:
        return tested_cases()
    if names == "ranked":
        return ranked()
    known = all_cases()
    unknown = [name for name in names if name not in known]
    if isinstance(names, str) or unknown:
        raise ValueError(f"cases: {unknown or names!r} unknown; expected 'ranked', None, or names of all_cases()")
    return {name: known[name] for name in names}
