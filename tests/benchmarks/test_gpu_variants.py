"""What a worker on the device knows of the kernels that it launches, and its steps on a device that is imitated."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from benchmarks.gpu.crew import Crew, Task
from benchmarks.gpu.variants import interpreter_is_sound
from tests.benchmarks.misbehaving import nothing
from tests.kernels.sparse_interpreter import SparseCase
from tests.kernels.triton_interpreter import Case, use_interpreter

pytest.importorskip("triton", reason="the kernels need Triton (Linux)")


def compiled(cache: str) -> dict[str, Any]:
    """Compiles the merge kernel for Hopper by a launch that ends before the device, twice."""
    # Before Triton is imported.
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["TRITON_CACHE_DIR"] = cache
    import torch
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    from benchmarks.gpu.variants import RECORD
    from vllm_trimix.kernels import triton_merge
    from vllm_trimix.kernels.triton_merge import Partials, merge_partials_kernel

    class Imitation:
        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", 90, 32)

    driver.set_active(Imitation())
    RECORD.install()
    partials = Partials(torch.empty(1, 128, 128), torch.empty(1, 2, 128))
    constants = triton_merge.merge_constants(partials, num_heads=4, num_kv_heads=1, head_size=128, has_v_scale=False)
    out = torch.empty(8, 4, 128, dtype=torch.bfloat16)
    merges = torch.zeros(1, 4, dtype=torch.int32)
    arguments = (partials.values, partials.stats, merges, out, None, *out.stride()[:2])
    found: dict[str, Any] = {}
    for which in ("first", "again"):
        # What a launch calls, without its last step.
        merge_partials_kernel.run(*arguments, **constants, num_warps=4, grid=(1, 8), warmup=True)
        found[f"{which} compile_s"] = RECORD.compile_s
        found[which] = RECORD.take()
    return found | {"empty": RECORD.take()}


def test_what_was_launched_and_how_long_it_took_to_compile(tmp_path: Path) -> None:
    with Crew(1, prepare=nothing, sound=nothing) as crew:
        [ended] = crew.run([Task("", compiled, (str(tmp_path),))], limit=300)
    assert ended.how == "returned", (ended.error, ended.trace)
    with Crew(1, prepare=nothing, sound=nothing) as crew:
        [later] = crew.run([Task("", compiled, (str(tmp_path),))], limit=300)
    # Another process found it in Triton's cache.
    assert later.value["first"] == ended.value["first"]
    assert later.value["first compile_s"] == 0
    [facts] = ended.value["first"]
    assert ended.value["again"] == [facts]
    assert ended.value["empty"] == []
    assert (facts["kernel"], facts["target"]) == ("merge_partials_kernel", "sm_90")
    assert (facts["num_warps"], len(facts["hash"])) == (4, 12)
    assert isinstance(facts["shared_bytes"], int)
    # Found when a kernel is loaded.
    assert facts["registers"] is facts["spills"] is None
    assert ended.value["first compile_s"] > 0.05
    assert ended.value["again compile_s"] == 0


@contextlib.contextmanager
def imitated() -> Iterator[None]:
    """A device whose tensors are copies on the CPU: the branches that CUDA takes, without CUDA."""
    from benchmarks.gpu import case_steps

    with (
        mock.patch.object(case_steps.torch.cuda, "synchronize"),
        mock.patch.object(case_steps, "ptxas_version", return_value="ptxas 0"),
    ):
        yield


def on_imitated(function: Any, *arguments: Any) -> Any:
    """Calls a function of a worker on it."""
    with imitated():
        return function(*arguments)


def estimate_case() -> Any:
    from tests.kernels.test_triton_estimate import EstimateCase

    return EstimateCase(5, 70, group=1, q_dtype="bfloat16", cache_dtype="float8_e4m3fn")


@pytest.mark.parametrize(
    "kind",
    [
        "triangle",
        pytest.param("sparse", marks=pytest.mark.slow),
        pytest.param("estimate", marks=pytest.mark.slow),
    ],
)
def test_every_step_of_a_right_case_says_that_it_is_right(kind: str) -> None:
    from benchmarks.gpu.case_steps import attempt, step, steps_of
    from benchmarks.gpu.case_triage import conclude

    fp8: dict[str, Any] = {"q_dtype": "float8_e4m3fn", "cache_dtype": "float8_e4m3fn"}
    cases: dict[str, Any] = {
        "triangle": Case(((1030, 4),), dense=(0,), programs=4, num_kv_heads=1, group=2, **fp8),
        "sparse": SparseCase(70, 9, num_kv_heads=1, num_columns=20, **fp8),
        "estimate": estimate_case(),
    }
    case = cases[kind]
    tasks = [Task("attempt", on_imitated, (attempt, case, "cpu:0"))]
    tasks += [Task(name, on_imitated, (step, case, "cpu:0", name)) for name in steps_of(case)]
    with Crew(1, prepare=use_interpreter, sound=interpreter_is_sound) as crew:
        found = {ended.task.name: ended for ended in crew.run(tasks, limit=300)}
    wrong = {name: (ended.error, ended.trace) for name, ended in found.items() if ended.how != "returned"}
    # FlashAttention alone needs a device that is none of the CPU's.
    assert not wrong
    steps = {name: ended.value for name, ended in found.items()}
    first = steps.pop("attempt")
    assert first["error"] == ""
    assert 0 < first["of_budget"] <= 1
    assert set(first["seconds"]) == {"build", "first", "compile", "run", "check"}
    assert steps["look"]["parts"] == steps["look"]["faults"] == []
    assert steps["look"]["second_launch"] == "the same bits"
    assert steps["reference"]["right"]
    for name, value in steps.items():
        assert name == "look" or value.get("right", "skipped" in value), name
    if kind == "triangle":
        assert {"no_split", "wide_scores"} <= steps.keys()
    assert conclude("error 3", steps).startswith("it is right this time; it failed with error 3")


def flash_step(case: Any, off: float) -> dict[str, Any]:
    """The step beside a stand-in for FlashAttention whose answers are off by so much."""
    import sys

    from benchmarks.gpu.flash_check import flash_beside_kernel
    from tests.backend.flash_on_cpu import flash_on_cpu

    with flash_on_cpu() as flash:
        package = sys.modules["vllm.vllm_flash_attn"]
        package.is_fa_version_supported = lambda version: version == 3
        exact = package.flash_attn_varlen_func
        package.flash_attn_varlen_func = lambda **arguments: exact(**arguments) + off
        found = flash_beside_kernel(case, "cpu:0")
        return found | {"calls": [(list(call["window_size"]), call["version"], len(call["q"])) for call in flash.calls]}


@pytest.fixture(scope="module")
def crew() -> Iterator[Crew]:
    pytest.importorskip("vllm", reason="FlashAttention is vLLM's")
    with Crew(1, prepare=use_interpreter, sound=interpreter_is_sound) as crew:
        yield crew


STRADDLING = Case(((0, 5), (70, 20)), last_rows=(0, 6), n_local=30, num_kv_heads=1, group=2, soft_cap=5.0)
SPARSE = SparseCase(70, 9, num_kv_heads=1, num_columns=20)
SKIPPED = [replace(STRADDLING, q_dtype="float32"), replace(SPARSE, cache_dtype="float8_e4m3fn"), estimate_case()]


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_flash_attention_computes_the_rows_that_it_can(crew: Crew, off: float) -> None:
    """Its masks, offsets and pages are those of the kernel: without sinks both are right."""
    tasks = [Task(kind, flash_step, (case, off)) for kind, case in (("triangle", STRADDLING), ("sparse", SPARSE))]
    found = {ended.task.name: ended for ended in crew.run(tasks, limit=300)}
    assert {ended.how for ended in found.values()} == {"returned"}, [ended.error for ended in found.values()]
    triangle, sparse = found["triangle"].value, found["sparse"].value
    assert triangle["calls"] == [([29, 0], 3, 5), ([29, 0], 3, 14), ([-1, -1], 3, 6)]
    assert sparse["calls"] == [([-1, -1], 3, 9)]
    assert (triangle["kernel"], sparse["kernel"]) == (0, 0)
    assert (triangle["flash"], sparse["flash"]) == ((25 * 2 * 64, 9 * 2 * 64) if off else (0, 0))
    assert "n_init=0" in triangle["compared"]
    assert "FlashAttention 3" in triangle["compared"]


def test_flash_attention_has_nothing_to_say_of_other_dtypes(crew: Crew) -> None:
    tasks = [Task(str(number), flash_step, (case, 0.0)) for number, case in enumerate(SKIPPED)]
    said = [ended.value["skipped"] for ended in crew.run(tasks, limit=300)]
    assert said == [
        "FlashAttention's fp8 rounds differently, and it has no fp32",
        "FlashAttention's fp8 rounds differently, and it has no fp32",
        "FlashAttention gives no sums of probabilities",
    ]
