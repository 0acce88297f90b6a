"""The kernel benchmark's red gate, on vLLM's real CPU ops."""

from __future__ import annotations

import dataclasses
import importlib

import pytest
import torch

from benchmarks.kernels import contenders
from benchmarks.kernels.problem import Problem, _fill_cuda_cache, make_problem
from benchmarks.kernels.reference import make_reference
from benchmarks.kernels.timing import Measurement, measure
from tests.backend.flash_on_cpu import flash_on_cpu
from tests.benchmarks.kernel_settings import MUTANTS, TRIMIX_CPU, mutated, settings
from vllm_trimix.patterns.triangle import Triangle


@pytest.mark.parametrize("pattern", [Triangle(8, 100, 30), Triangle()], ids=["small", "published"])
def test_a_wrong_kernel_gets_no_time(pattern: Triangle) -> None:
    """One key or one row off is enough, at the published parameters too."""
    entrants = {"right": TRIMIX_CPU} | {
        change: dataclasses.replace(TRIMIX_CPU, prepare=lambda problem, change=change: mutated(problem, change))
        for change in MUTANTS
    }
    problem = make_problem(settings(pattern=pattern), 1100)
    results = measure(problem, entrants, repeats=1)
    assert results["right"].status == "ok", results["right"].reason
    assert len(results["right"].samples) == 1
    for change in MUTANTS:
        assert results[change].status == "refused", change
        assert "exceeds the budget" in results[change].reason
        assert results[change].samples == results[change].plan_samples == []


def test_a_kernel_that_turns_wrong_loses_its_times() -> None:
    right = contenders.CONTENDERS["vllm_cpu"]

    class TurnsWrong:
        def __init__(self, problem: Problem) -> None:
            self._inner, self._runs = right.prepare(problem), 0
            self.plan = self._inner.plan

        def run(self) -> list[torch.Tensor]:
            self._runs += 1
            outputs = self._inner.run()
            return outputs if self._runs < 4 else [output * 1.05 for output in outputs]

    result = measure(make_problem(settings(), 300), {"x": dataclasses.replace(right, prepare=TurnsWrong)}, repeats=2)
    assert result["x"].status == "refused"
    assert result["x"].samples == []


def test_rows_left_unwritten_are_refused() -> None:
    right = contenders.CONTENDERS["vllm_cpu"]

    class Lazy:
        def __init__(self, problem: Problem) -> None:
            self._inner = right.prepare(dataclasses.replace(problem, chunks=problem.chunks[1:]))
            self._out = [problem.out]
            self.plan = self._inner.plan

        def run(self) -> list[torch.Tensor]:
            self._inner.run()
            return self._out

    result = measure(make_problem(settings(), 600), {"x": dataclasses.replace(right, prepare=Lazy)}, repeats=1)
    assert result["x"].status == "refused"


def test_making_ready_takes_no_time_yet() -> None:
    """Compiled, warm and judged before the first round: what comes later may have the device to itself."""
    right = contenders.CONTENDERS["vllm_cpu"]
    runs = {"right": 0, "wrong": 0}

    class Counted:
        def __init__(self, problem: Problem, name: str) -> None:
            self._inner, self._name = right.prepare(problem), name
            self.plan = self._inner.plan

        def run(self) -> list[torch.Tensor]:
            runs[self._name] += 1
            outputs = self._inner.run()
            return outputs if self._name == "right" else [output * 1.05 for output in outputs]

    entrants = {
        name: dataclasses.replace(right, prepare=lambda problem, name=name: Counted(problem, name)) for name in runs
    }
    measurement = Measurement(make_problem(settings(), 300), entrants)
    assert runs == {"right": 0, "wrong": 0}
    measurement.prepare()
    assert runs == {"right": 2, "wrong": 2}
    assert measurement.results["wrong"].status == "refused"
    assert measurement.results["right"].samples == []
    for number in range(3):
        measurement.round(last=number == 2)
    # What was wrong takes no further part.
    assert runs == {"right": 5, "wrong": 2}
    assert len(measurement.results["right"].samples) == 3


def test_a_failing_contender_spoils_nothing() -> None:
    def broken(problem: Problem) -> contenders.Prepared:
        raise RuntimeError("no\nkernel image")

    right = contenders.CONTENDERS["vllm_cpu"]
    entrants = {"broken": dataclasses.replace(right, prepare=broken), "right": right}
    results = measure(make_problem(settings(), 200), entrants, repeats=1)
    assert (results["broken"].status, results["broken"].reason) == ("failed", "RuntimeError: no kernel image")
    assert results["right"].status == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_cpu_contenders_are_right(dtype: torch.dtype) -> None:
    """In every dtype, with the last rows straddling a step and a last step of one row."""
    shape = settings(dtype=dtype, chunk=280)
    names = ["vllm_cpu", "torch_sdpa", "trimix_cpu", "trimix_cpu_sdpa"]
    results = measure(make_problem(shape, 561), {name: contenders.CONTENDERS[name] for name in names}, repeats=1)
    assert {name: (result.status, result.reason) for name, result in results.items()} == dict.fromkeys(
        names, ("ok", None)
    )


def test_fp8_products_have_a_budget_of_their_own() -> None:
    """An fp8 kernel's probabilities have three bits; the budget of bf16 kernels would refuse every one of them."""
    problem = make_problem(settings(), 700)
    plain = make_reference(problem, problem.settings.pattern).budget
    fp8 = make_reference(problem, problem.settings.pattern, fp8_products=True).budget
    assert 2 * plain.rms < fp8.rms < 0.1


CUDA_ONLY = {"vllm_fa2", "vllm_fa3", "vllm_fa4", "flashinfer", "cudnn_sdpa", "flash_attn", "xformers"} | {
    name for name in contenders.CONTENDERS if name.startswith(("trimix_triton", "trimix_flash"))
}


def test_cuda_contenders_say_why_they_cannot_run() -> None:
    importlib.import_module("benchmarks.kernels.cuda_contenders")
    assert contenders.CONTENDERS.keys() >= CUDA_ONLY
    for name in CUDA_ONLY:
        assert contenders.CONTENDERS[name].unavailable(settings()) == "runs on cuda, not on cpu"
    if torch.cuda.is_available():
        pytest.skip("the reasons below are those of a machine without a GPU")
    cuda = settings(device=torch.device("cuda"))
    assert contenders.CONTENDERS["vllm_cpu"].unavailable(cuda) == "runs on cpu, not on cuda"
    for name in ("vllm_fa2", "vllm_fa3", "vllm_fa4"):
        assert "FlashAttention" in contenders.CONTENDERS[name].unavailable(cuda)
    for name in ("flashinfer", "flash_attn", "xformers"):
        assert contenders.CONTENDERS[name].unavailable(cuda) == f"the package {name} is not installed"
    assert contenders.CONTENDERS["cudnn_sdpa"].unavailable(cuda) == "this torch has no cuDNN"
    assert contenders.CONTENDERS["trimix_triton"].unavailable(cuda)
    for name in ("trimix_flash_merge", "trimix_flash_pages"):
        assert "FlashAttention" in contenders.CONTENDERS[name].unavailable(cuda)


def test_rounded_to_pages_is_checked_against_its_own_mask() -> None:
    """Right by its own definition, and wrong by the triangle's: the gate must know which one it is told."""
    problem = make_problem(settings(pattern=Triangle(8, 100, 30)), 1100)
    position, block_size = torch.arange(1100), problem.settings.block_size
    slots = problem.block_table[0, position // block_size] * block_size + position % block_size
    blocks = problem.block_table.numel() + 1
    problem.kv_cache, _ = _fill_cuda_cache(problem.settings, problem.k, problem.v, slots, blocks)
    merge, pages = (contenders.CONTENDERS[f"trimix_flash_{name}"] for name in ("merge", "pages"))
    assert "superset, rounded to pages" in pages.about
    wrong = {"merge as pages": dataclasses.replace(merge, own_mask=pages.own_mask)}
    wrong["pages as merge"] = dataclasses.replace(pages, own_mask=None)
    with flash_on_cpu():
        results = measure(problem, {"merge": merge, "pages": pages, **wrong}, repeats=1)
    assert {name: result.status for name, result in results.items()} == {
        "merge": "ok",
        "pages": "ok",
        "merge as pages": "refused",
        "pages as merge": "refused",
    }, results
