"""The Triton kernels compile for each GPU generation, without a GPU, within what the device has.

Under every Triton that users run: what vLLM 0.32 and 0.33 bring on CUDA, and 3.6. The first is the installed one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels.prediction import INSTRUCTIONS
from tests.wheels import fetch

pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")

ROOT = Path(__file__).parents[2]
INSTALLED = "3.7.1"
OTHERS = ("3.6.0", "3.8.0")
# Shared memory a thread block may use, in KiB (CUDA programming guide, "compute capabilities").
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
WALKS_KEYS = ("prefill", "sparse-64", "sparse-128")
ESTIMATES = ("estimate-stats", "estimate-sums")
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
Compiled = tuple[str, list[dict[str, Any]]]


def _compile(arguments: list[str], folder: Path, *, triton: Path | None = None) -> Compiled:
    """Output and reports of the compile tool, which compiles from scratch in a process that doesn't interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(triton), environment.get("PYTHONPATH", "")])
    run = subprocess.run(
        [
            sys.executable,
            "-m",
            "vllm_trimix.kernels.triton_compile",
            "--json",
            str(folder / "reports.json"),
            *arguments,
        ],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    reports = json.loads((folder / "reports.json").read_text())
    assert len(reports) == len(arguments) or not arguments
    return run.stdout, reports


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Compiled]:
    """Gives the default variants compiled by one version of Triton."""

    def compile_defaults(version: str) -> Compiled | str:
        triton = None
        if version != INSTALLED:
            triton = ROOT / "build" / f"triton-{version}"
            missing = fetch(f"triton=={version}", triton)
            if missing is not None:
                return missing
        return _compile([], tmp_path_factory.mktemp(f"triton-{version}"), triton=triton)

    results: dict[str, Compiled | str] = {}

    def of(version: str) -> Compiled:
        if version not in results:
            results[version] = compile_defaults(version)
        compiled = results[version]
        if isinstance(compiled, str):
            pytest.skip(compiled)
        return compiled

    return of


def _assert_fits(report: dict[str, Any]) -> None:
    assert report["spill_bytes"] == 0, report
    assert 0 < report["registers"] <= 255, report
    assert 0 <= report["shared_bytes"] <= SHARED_KIB[report["variant"]["capability"]] * 1024, report


@pytest.mark.parametrize("version", [INSTALLED, *(pytest.param(version, marks=pytest.mark.slow) for version in OTHERS)])
class TestDataCentreGpus:
    def test_covers_the_table(self, defaults: Callable[[str], Compiled], version: str) -> None:
        text, reports = defaults(version)
        assert text.startswith(f"Triton {version}\n")
        variants = {(r["variant"]["capability"], r["variant"]["kernel"], r["variant"]["head_size"]) for r in reports}
        sizes = [(kernel, size) for kernel in WALKS_KEYS for size in (64, 96, 128, 256)]
        sizes += [("merge", 128), *((kernel, size) for kernel in ESTIMATES for size in (128, 256))]
        assert variants == {(capability, *size) for capability in (80, 90, 100) for size in sizes}

    def test_fits_without_spills(self, defaults: Callable[[str], Compiled], version: str) -> None:
        for report in defaults(version)[1]:
            _assert_fits(report)

    def test_multiplies_on_tensor_cores_with_a_pipeline(
        self, defaults: Callable[[str], Compiled], version: str
    ) -> None:
        for report in defaults(version)[1]:
            if report["variant"]["kernel"] != "merge":
                assert report["matrix_instruction"] == MATRIX_INSTRUCTION[report["variant"]["capability"]], report
                assert report["matrix_instructions"] > 0, report
                assert report["async_copies"] > 0, report

    def test_hopper_does_not_wait_after_every_product(self, defaults: Callable[[str], Compiled], version: str) -> None:
        """One wait a step, or one for each of its two products: registers suffice, and products overlap the softmax."""
        for report in defaults(version)[1]:
            if report["variant"]["capability"] == 90 and report["variant"]["kernel"] in WALKS_KEYS:
                assert 1 <= report["loop_waits"] <= 2, report

    def test_hopper_issues_no_slower_than_it_multiplies(
        self, defaults: Callable[[str], Compiled], version: str
    ) -> None:
        """64 keys of head size 128 keep the tensor cores busy for 1024 cycles; two warps share a scheduler."""
        loops = [
            report["loop_instructions"] - report["mask_instructions"]
            for report in defaults(version)[1]
            if report["variant"]["capability"] == 90
            and report["variant"]["head_size"] == 128
            and report["variant"]["kernel"] == "prefill"
            and report["variant"]["cache_dtype"] in ("bf16", "fp16")
        ]
        assert len(loops) == 2
        assert 0 < 2 * max(loops) <= 1024
        if version == INSTALLED:
            assert loops == [INSTRUCTIONS] * 2


def test_the_documented_table_is_what_compiles(defaults: Callable[[str], Compiled]) -> None:
    text, _ = defaults(INSTALLED)
    assert text in (ROOT / "docs/kernels.md").read_text(), "docs/kernels.md: run triton_compile and paste its output"


@pytest.mark.parametrize("capability", [86, 89, 120])
def test_gpus_with_little_shared_memory(capability: int, tmp_path: Path) -> None:
    for report in _compile([f"{capability},{head_size},bf16,bf16" for head_size in (64, 128, 256)], tmp_path)[1]:
        _assert_fits(report)


@pytest.mark.parametrize("capability", [80, 90])
def test_gqa_groups_and_page_sizes(capability: int, tmp_path: Path) -> None:
    shapes = [(1, 16), (7, 16), (8, 48), (4, 64), (4, 128), (4, 784)]
    variants = [f"{capability},128,bf16,bf16,{group},{size}" for group, size in shapes]
    for report in _compile([*variants, f"{capability},128,bf16,bf16,4,16,200"], tmp_path)[1]:
        _assert_fits(report)
        assert report["matrix_instruction"] == MATRIX_INSTRUCTION[capability], report
        assert report["loop_waits"] <= 2, report


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 89, 120])
def test_sparse_prefill_on_gpus_with_little_shared_memory(capability: int, tmp_path: Path) -> None:
    kernels = ("sparse-64", "sparse-128", *ESTIMATES)
    for report in _compile(
        [f"{capability},{d},bf16,bf16,{kernel}" for kernel in kernels for d in (128, 256)], tmp_path
    )[1]:
        _assert_fits(report)


@pytest.mark.parametrize(
    "capability", [pytest.param(80, marks=pytest.mark.slow), 90, pytest.param(100, marks=pytest.mark.slow)]
)
def test_what_sparse_prefill_may_have_to_do(capability: int, tmp_path: Path) -> None:
    """Blocks alone, columns alone, capped logits; other pages; fp8 of the head sizes that the table leaves out."""
    fp8 = "fp8e5" if capability == 80 else "fp8e4nv"
    variants = [
        f"{capability},128,bf16,bf16,7,64,{kernel},{sparse}"
        for kernel in ("sparse-64", "sparse-128")
        for sparse in ("plain", "columns", "columns,band,soft_cap")
    ]
    variants += [f"{capability},{d},bf16,{fp8},4,48,sparse-128,columns,band,soft_cap" for d in (64, 256)]
    for report in _compile(variants, tmp_path)[1]:
        _assert_fits(report)
        assert report["matrix_instruction"] == MATRIX_INSTRUCTION[capability], report
        assert capability != 90 or 1 <= report["loop_waits"] <= 2, report


def test_fp32_stays_ieee(tmp_path: Path) -> None:
    """No tensor core: those would round fp32 to TF32."""
    kernels = ("prefill", "sparse-64", "sparse-128", *ESTIMATES)
    variants = [f"90,{head_size},fp32,fp32,{kernel}" for head_size in (64, 128, 256) for kernel in kernels]
    for report in _compile(variants, tmp_path)[1]:
        _assert_fits(report)
        assert report["matrix_instruction"] == "", report
