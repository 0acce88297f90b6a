"""The Triton triangle kernel compiles for each GPU generation, without a GPU, within what the device has."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")

# Shared memory a thread block may use, in KiB (CUDA programming guide, "compute capabilities").
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
HEAD_SIZES = (64, 96, 128, 256)


def _run(arguments: list[str], cache: Path) -> list[str]:
    """Lines of the compile tool, which compiles from scratch in a process that doesn't interpret."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "vllm_trimix.kernels.triton_compile", *arguments],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def _compile(variants: list[str], cache: Path) -> list[dict]:
    reports = [json.loads(line) for line in _run(["--json", *variants], cache)]
    assert len(reports) == len(variants)
    return reports


def _assert_fits(report: dict) -> None:
    assert report["spill_bytes"] == 0, report
    assert 0 < report["registers"] <= 255, report
    assert 0 < report["shared_bytes"] <= SHARED_KIB[report["variant"]["capability"]] * 1024, report


@pytest.mark.parametrize("capability", [80, 90, 100])
def test_data_centre_gpus(capability, tmp_path):
    # Compute capability 8.0 has no e4m3.
    fp8 = "fp8e4nv" if capability >= 89 else "fp8e5"
    dtypes = ("bf16,bf16", "fp16,fp16", f"bf16,{fp8}")
    variants = [f"{capability},{head_size},{pair}" for head_size in HEAD_SIZES for pair in dtypes]
    for report in _compile(variants, tmp_path):
        _assert_fits(report)
        assert report["matrix_instruction"] == MATRIX_INSTRUCTION[capability], report
        assert report["matrix_instructions"] > 0, report
        assert report["async_copies"] > 0, report


@pytest.mark.parametrize("capability", [86, 89, 120])
def test_gpus_with_little_shared_memory(capability, tmp_path):
    for report in _compile([f"{capability},{head_size},bf16,bf16" for head_size in (64, 128, 256)], tmp_path):
        _assert_fits(report)


@pytest.mark.parametrize("capability", [80, 90])
def test_gqa_groups_and_page_sizes(capability, tmp_path):
    shapes = [(1, 16), (7, 16), (8, 48), (4, 64), (4, 128), (4, 784)]
    for report in _compile([f"{capability},128,bf16,bf16,{group},{size}" for group, size in shapes], tmp_path):
        _assert_fits(report)
        assert report["matrix_instruction"] == MATRIX_INSTRUCTION[capability], report


def test_fp8_queries_compute_in_bf16(tmp_path):
    for report in _compile([f"90,{head_size},fp8e4nv,fp8e4nv" for head_size in (64, 128, 256)], tmp_path):
        _assert_fits(report)
        assert report["matrix_instruction"] == "wgmma.mma_async", report


def test_fp32_stays_ieee(tmp_path):
    """No tensor core: those would round fp32 to TF32."""
    for report in _compile([f"90,{head_size},fp32,fp32" for head_size in (64, 128, 256)], tmp_path):
        _assert_fits(report)
        assert report["matrix_instruction"] == "", report


def test_prints_a_markdown_table(tmp_path):
    header, rule, row = _run(["90,64,bf16,bf16"], tmp_path)[-3:]
    assert header.startswith("| target | head size |")
    assert set(rule) == {"|", "-"}
    assert row.startswith("| sm_90 | 64 | bf16 / bf16 |")
    assert row.endswith("wgmma.mma_async |")
