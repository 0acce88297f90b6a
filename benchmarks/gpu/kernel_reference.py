"""The Triton kernels on the device against their definitions: the cases of the interpreter tests, and larger ones."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from benchmarks.gpu.report import Report
from tests.kernels import sparse_interpreter, test_triton_estimate, test_triton_sparse, test_triton_triangle
from tests.kernels.triton_interpreter import Case, interpreter_pool, run_case

_WORKERS = 8
_HEAD_SIZES, _PAGES, _GROUPS = (64, 96, 128, 256), (16, 32, 64, 128), (1, 4, 7, 8)
_DTYPES = (("bfloat16", ""), ("float16", ""), ("bfloat16", "float8_e4m3fn"), ("float16", "float8_e5m2"))
_TIMES_TWO = (0, 2, 3, 1)  # In the field of four elements, where + is ^.


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


def _runner(case: Any) -> Callable[[Any, str], None]:
    """What runs a case of its kind on a device."""
    kinds = {
        Case: run_case,
        sparse_interpreter.SparseCase: sparse_interpreter.run_case,
        test_triton_estimate.EstimateCase: test_triton_estimate.run_case,
    }
    return kinds[type(case)]


def kernel_reference(report: Report) -> None:
    """Runs every case; one check for all, and one for each that fails."""
    cases: dict[str, Any] = {**test_triton_triangle.CASES, **pairs()}
    cases |= {f"sparse-{name}": case for name, case in test_triton_sparse.CASES.items()}
    cases |= {f"estimate-{name}": case for name, case in test_triton_estimate.CASES.items()}
    if report.settings["cases"] is not None:
        cases = {name: cases[name] for name in report.settings["cases"]}
    passed: list[str] = []
    skipped: list[str] = []
    huge = {name: case for name, case in cases.items() if case.huge}
    ordinary = {name: case for name, case in cases.items() if not case.huge}
    workers = min(_WORKERS, os.cpu_count() or 1) if report.cuda else 1
    # Tensors with a stride of 2**30 elements fill the device's memory: one at a time.
    for group, parallel in ((ordinary, workers), (huge, 1)):
        if group:
            with _pool(report, parallel) as pool:
                _run(report, pool, group, passed, skipped)
    failed = len(cases) - len(passed) - len(skipped)
    report.figure(cases=len(cases), cases_skipped=skipped)
    where = "on the device" if report.cuda else "in the interpreter"
    report.check("cases", not failed and passed, f"{len(passed)} of {len(cases)} {where} within budget")
    report.seen(f"{len(passed)} of {len(cases)} cases {where} within the error budget, {len(skipped)} did not fit")


def _pool(report: Report, workers: int) -> Executor:
    if not report.cuda:
        return interpreter_pool()
    return ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_use_device)


def _use_device() -> None:
    import torch

    os.environ.pop("TRITON_INTERPRET", None)
    torch.set_num_threads(1)


def _run(report: Report, pool: Executor, cases: dict[str, Any], passed: list[str], skipped: list[str]) -> None:
    device = "cuda" if report.cuda else "cpu"
    running = {name: pool.submit(_runner(case), case, device) for name, case in cases.items()}
    for name, future in running.items():
        error = future.exception()
        if error is None:
            passed.append(name)
        elif type(error).__name__ == "OutOfMemoryError":
            skipped.append(name)
        else:
            report.check(name, False, _one_line(str(error) or repr(error)))


def _one_line(text: str, lines: Iterable[int] = range(3)) -> str:
    return " ".join(line.strip() for index, line in enumerate(text.splitlines()) if index in lines)[:500]
