"""What a worker does with one case: an attempt, and after a failure the steps that tell its cause.

Each step builds the case anew, so that any of them may kill its process.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu.differences import budget_of, describe, share_of_budget, wrong_of
from benchmarks.gpu.flash_check import flash_beside_kernel
from benchmarks.gpu.kernel_cases import Launch, prepare_launch
from benchmarks.gpu.variants import RECORD, ptxas_version
from tests.kernels.sparse_interpreter import SparseCase
from tests.kernels.triton_interpreter import Case

# Exact in every output dtype, and far from any answer.
_MARK = 12288.0
_FP8 = "float8_e4m3fn"


def attempt(case: Any, device: str) -> dict[str, Any]:
    """Launches a case, on CUDA twice, and compares it with its definition.

    Returns:
        ``error``, "" where there is none; ``of_budget``, the largest error in units of what is allowed; ``seconds`` by
        what they were spent on; ``variants`` that were launched. ``run`` is of a launch whose kernels are compiled.
    """
    started = time.perf_counter()
    seconds: dict[str, float] = {}

    def lap(name: str) -> None:
        nonlocal started
        if device != "cpu":
            torch.cuda.synchronize()
        now = time.perf_counter()
        seconds[name], started = round(now - started, 4), now

    launch = prepare_launch(case, device)
    lap("build")
    RECORD.take()
    launch.run()
    lap("first")
    seconds["compile"] = round(RECORD.compile_s, 3)
    variants = RECORD.take()
    error = ""
    if device != "cpu":
        first = launch.outputs()
        launch.fill(math.nan)
        started = time.perf_counter()
        launch.run()
        lap("run")
        error = _unlike(first, launch.outputs())
    answer = launch.answer()
    lap("check")
    try:
        answer.check()
    except AssertionError as wrong:
        error = str(wrong)
    of_budget = max(map(share_of_budget, answer.parts))
    return {"error": error, "of_budget": of_budget, "seconds": seconds, "variants": variants}


def steps_of(case: Any) -> list[str]:
    """Names of the steps that a failing case goes through, the most telling first."""
    steps = ["look", "reference", "clean"]
    if isinstance(case, Case) and case.programs:
        steps.append("no_split")
    if case.q_dtype == case.cache_dtype == _FP8:
        steps.append("wide_scores")
    return [*steps, "no_lookahead", "one_stage", "four_warps", "fp32", "flash"]


def step(case: Any, device: str, name: str) -> dict[str, Any]:
    """One step of ``steps_of``, in plain types; ``skipped`` says why it means nothing for this case."""
    steps: dict[str, Callable[[Any, str], dict[str, Any]]] = {
        "look": _look,
        "reference": _reference,
        "clean": _clean,
        "no_split": lambda case, device: _outcome(prepare_launch(replace(case, programs=0), device)),
        "wide_scores": _wide_scores,
        "no_lookahead": lambda case, device: _reshaped(case, device, lookahead=False),
        "one_stage": lambda case, device: _reshaped(case, device, num_stages=1),
        "four_warps": lambda case, device: _reshaped(case, device, num_warps=4),
        "fp32": _fp32,
        "flash": flash_beside_kernel,
    }
    return steps[name](case, device)


def _look(case: Any, device: str) -> dict[str, Any]:
    """What is wrong, whether a second launch gives the same, what was never written, and which kernels ran."""
    launch = prepare_launch(case, device)
    RECORD.take()
    launch.run()
    answer, first = launch.answer(), launch.outputs()
    found: dict[str, Any] = {"variants": RECORD.take(), "faults": answer.faults}
    if device != "cpu":
        found["ptxas"] = ptxas_version()
    described = (describe(part, **_tiles(launch)) for part in answer.parts)
    found["parts"] = [part for part in described if part]
    launch.fill(math.nan)
    launch.run()
    found["second_launch"] = _unlike(first, launch.outputs()) or "the same bits"
    launch.fill(_MARK)
    launch.run()
    unwritten = [(part.got == _MARK) for part in launch.answer().parts]
    found["unwritten"] = sum(int(part.sum()) for part in unwritten)
    return found


def _tiles(launch: Launch) -> dict[str, int]:
    """Rows of the launch's tiles, and how many of the first one come before the case's rows."""
    if isinstance(launch.case, SparseCase):
        block = launch.case.block_size
        return {"tile_rows": block, "origin": launch.case.position % block}
    return {"tile_rows": launch.arguments.get("tile_rows", 64)}


def _outcome(launch: Launch) -> dict[str, Any]:
    """Whether a changed launch is right, and how wrong it is."""
    launch.run()
    answer = launch.answer()
    wrong = sum(int(wrong_of(part, budget_of(part)).sum()) for part in answer.parts)
    return {
        "right": wrong == 0 and not answer.faults,
        "wrong": wrong,
        "nan": sum(int(part.got.isnan().sum()) for part in answer.parts),
    }


def _reference(case: Any, device: str) -> dict[str, Any]:
    """Plain PyTorch on the device, fp64, from the very pages, table and queries that the kernel reads."""
    launch = prepare_launch(case, device)
    answers, largest, most = launch.reference(), 0.0, 0.0
    launch.run()
    for got, part in zip(answers, launch.answer().parts, strict=True):
        error = (got - part.truth).abs().max().item()
        largest = max(largest, error) if error == error else math.inf
        most = max(most, part.truth.abs().max().item())
    return {"right": largest <= 1e-9 * max(1.0, most), "error": largest}


def _clean(case: Any, device: str) -> dict[str, Any]:
    """The same with zeros in place of NaN in slots that no row may read, and in the workspace of split keys."""
    launch = prepare_launch(case, device)
    for name in ("k_cache", "v_cache"):
        if name in launch.arguments:
            cache = launch.arguments[name]
            # 8-bit floats have no masked_fill_ everywhere; all bits zero are 0.
            bits = cache.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[cache.element_size()])
            bits.masked_fill_(cache.float().isnan(), 0)
    partials = launch.arguments.get("partials")
    if partials is not None:
        partials.values.zero_()
        partials.stats.zero_()
    return _outcome(launch)


@contextlib.contextmanager
def _launch_shape(**changes: Any) -> Iterator[list[bool]]:
    """Changes the launch shapes of all kernels; the list says of each shape that was asked for whether it differs."""
    # Triton may be missing.
    from vllm_trimix.kernels import triton_estimate, triton_sparse, triton_triangle

    differs: list[bool] = []

    def changed(original: Callable[..., Any]) -> Callable[..., Any]:
        def config(*args: Any) -> Any:
            before = original(*args)
            after = replace(before, **changes)
            differs.append(after != before)
            return after

        return config

    with contextlib.ExitStack() as stack:
        for module, name in (
            (triton_triangle, "config_for"),
            (triton_sparse, "sparse_config_for"),
            (triton_estimate, "estimate_config_for"),
        ):
            stack.enter_context(mock.patch.object(module, name, changed(getattr(module, name))))
        yield differs


def _reshaped(case: Any, device: str, **changes: Any) -> dict[str, Any]:
    """The case under another launch shape."""
    launch = prepare_launch(case, device)
    with _launch_shape(**changes) as differs:
        found = _outcome(launch)
    return found if any(differs) else {"skipped": "the launch shape is so already"}


def _wide_scores(case: Any, device: str) -> dict[str, Any]:
    """fp8 queries and keys, multiplied in 16 bits."""
    # Triton may be missing.
    from vllm_trimix.kernels import triton_launch

    original = triton_launch.matrix_dtypes

    def wide(*dtypes: torch.dtype) -> dict[str, Any]:
        found = original(*dtypes)
        return found | {"SCORE_DTYPE": found["COMPUTE_DTYPE"]}

    with mock.patch.object(triton_launch, "matrix_dtypes", wide):
        return _outcome(prepare_launch(case, device))


def _fp32(case: Any, device: str) -> dict[str, Any]:
    """The same shapes in fp32, other data: without tensor cores, and with IEEE products."""
    if case.q_dtype == "float32":
        return {"skipped": "it is fp32 already"}
    cache = case.cache_dtype if isinstance(case, Case | SparseCase) else ""
    tile = {"tile_rows": 0} if isinstance(case, Case) else {}
    return _outcome(prepare_launch(replace(case, q_dtype="float32", cache_dtype=cache, **tile), device))


def _unlike(one: list[torch.Tensor], other: list[torch.Tensor]) -> str:
    """How many values of two launches differ in a bit; "" if none does."""
    differ = sum(
        int(((first != second) & ~(first.isnan() & second.isnan())).sum())
        for first, second in zip(one, other, strict=True)
    )
    return f"two launches differ in {differ} values" if differ else ""
