"""The Triton kernels compile for each GPU generation, without a GPU, within what the device has.

Under every Triton that users run: what vLLM 0.32 and 0.33 bring on CUDA, and 3.6. The first is the installed one. The
fast tests compile for Hopper, for the others what differs there; the slow ones everything.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.kernels.bounds.compiled import SERVED, VERSIONS, read_reports
from benchmarks.kernels.compile_tables import PAGE, compile_reports, parts
from benchmarks.kernels.generated import fill
from tests.wheels import fetch

pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")

ROOT = Path(__file__).parents[2]
OTHERS = tuple(version for version in VERSIONS if version != SERVED)
# Shared memory a thread block may use, in KiB (CUDA programming guide, "compute capabilities").
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
WALKS_KEYS = ("prefill", "sparse-64", "sparse-128")
ESTIMATES = ("estimate-stats", "estimate-sums")
MATRIX_INSTRUCTION = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
Compiled = tuple[str, list[dict[str, Any]]]
GENERATIONS = (80, 90, 100)
# Where 3.8.0 is slower, as noted in docs/kernel-tables.md: version, capability, kernel, head size.
SPILLS = {("3.8.0", 80, "estimate-stats", 128): 8, ("3.8.0", 100, "estimate-stats", 256): 8}
WAITS = {("3.8.0", 90, "sparse-64", 256): 18, ("3.8.0", 90, "sparse-128", 256): 18}
# Of the installed version one generation is compiled in the fast tests, with every kernel and dtype.
HOPPER = (90,)
COMPILERS = [
    pytest.param(SERVED, HOPPER, id=f"{SERVED}-hopper"),
    *(pytest.param(version, GENERATIONS, id=version, marks=pytest.mark.slow) for version in (SERVED, *OTHERS)),
]


def _compile(arguments: list[str], folder: Path) -> list[dict[str, Any]]:
    """Reports of some variants, by the installed Triton."""
    _, reports = compile_reports(folder, arguments=arguments)
    assert len(reports) == len(arguments)
    return reports


@pytest.fixture(scope="module")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, tuple[int, ...]], Compiled]:
    """Gives the default variants, those for some generations, compiled by one version of Triton."""

    def compile_defaults(version: str, capabilities: tuple[int, ...]) -> Compiled | str:
        triton = None
        if version != SERVED:
            triton = ROOT / "build" / f"triton-{version}"
            missing = fetch(f"triton=={version}", triton)
            if missing is not None:
                return missing
        only = [] if capabilities == GENERATIONS else ["--capabilities", *map(str, capabilities)]
        return compile_reports(tmp_path_factory.mktemp(f"triton-{version}"), triton=triton, arguments=only)

    results: dict[tuple[str, tuple[int, ...]], Compiled | str] = {}

    def of(version: str, capabilities: tuple[int, ...] = GENERATIONS) -> Compiled:
        if (version, capabilities) not in results:
            results[version, capabilities] = compile_defaults(version, capabilities)
        compiled = results[version, capabilities]
        if isinstance(compiled, str):
            pytest.skip(compiled)
        return compiled

    return of


def _known(table: dict[tuple[Any, ...], int], version: str, report: dict[str, Any]) -> int | None:
    """What is known to be slow in a variant with keys as wide as its queries."""
    variant = report["variant"]
    same = variant["q_dtype"] == variant["cache_dtype"]
    return table.get((version, variant["capability"], variant["kernel"], variant["head_size"])) if same else None


def _assert_fits(report: dict[str, Any], version: str = SERVED) -> None:
    assert report["spill_bytes"] == (_known(SPILLS, version, report) or 0), report
    assert 0 < report["registers"] <= 255, report
    assert 0 <= report["shared_bytes"] <= SHARED_KIB[report["variant"]["capability"]] * 1024, report


Defaults = Callable[[str, tuple[int, ...]], Compiled]


@pytest.mark.parametrize(("version", "capabilities"), COMPILERS)
class TestDataCentreGpus:
    def test_covers_the_table(self, defaults: Defaults, version: str, capabilities: tuple[int, ...]) -> None:
        text, reports = defaults(version, capabilities)
        assert text.startswith(f"Triton {version}\n")
        variants = {(r["variant"]["capability"], r["variant"]["kernel"], r["variant"]["head_size"]) for r in reports}
        sizes = [(kernel, size) for kernel in WALKS_KEYS for size in (64, 96, 128, 256)]
        sizes += [("merge", 128), *((kernel, size) for kernel in ESTIMATES for size in (128, 256))]
        assert variants == {(capability, *size) for capability in capabilities for size in sizes}

    def test_fits_without_spills(self, defaults: Defaults, version: str, capabilities: tuple[int, ...]) -> None:
        for report in defaults(version, capabilities)[1]:
            _assert_fits(report, version)

    def test_multiplies_on_tensor_cores_with_a_pipeline(
        self, defaults: Defaults, version: str, capabilities: tuple[int, ...]
    ) -> None:
        for report in defaults(version, capabilities)[1]:
            if report["variant"]["kernel"] != "merge":
                assert report["matrix_instruction"] == MATRIX_INSTRUCTION[report["variant"]["capability"]], report
                assert report["matrix_instructions"] > 0, report
                assert report["async_copies"] > 0, report

    def test_hopper_does_not_wait_after_every_product(
        self, defaults: Defaults, version: str, capabilities: tuple[int, ...]
    ) -> None:
        """One wait a step, or one for each of its two products: registers suffice, and products overlap the softmax."""
        for report in defaults(version, capabilities)[1]:
            if report["variant"]["capability"] == 90 and report["variant"]["kernel"] in WALKS_KEYS:
                known = _known(WAITS, version, report)
                assert report["loop_waits"] in ((1, 2) if known is None else (known,)), report

    def test_hopper_issues_no_slower_than_it_multiplies(
        self, defaults: Defaults, version: str, capabilities: tuple[int, ...]
    ) -> None:
        """64 keys of head size 128 keep the tensor cores busy for 1024 cycles; two warps share a scheduler."""
        loops = [
            report["loop_instructions"] - report["mask_instructions"]
            for report in defaults(version, capabilities)[1]
            if report["variant"]["capability"] == 90
            and report["variant"]["head_size"] == 128
            and report["variant"]["kernel"] == "prefill"
            and report["variant"]["cache_dtype"] in ("bf16", "fp16")
        ]
        assert len(loops) == 2
        assert 0 < 2 * max(loops) <= 1024

    def test_is_what_is_stored(self, defaults: Defaults, version: str, capabilities: tuple[int, ...]) -> None:
        """Bounds and documented tables are made of the stored reports."""
        stored = [report for report in read_reports(version) if report["variant"]["capability"] in capabilities]
        assert stored == defaults(version, capabilities)[1], (
            f"run python -m benchmarks.kernels.compile_tables --compile {version}, "
            "then python -m benchmarks.kernels.prediction --write"
        )


def test_the_documented_tables_are_the_stored_ones() -> None:
    page = PAGE.read_text()
    assert fill(page, parts()) == page, "run python -m benchmarks.kernels.compile_tables"


@pytest.mark.parametrize(
    "capability", [86, *(pytest.param(capability, marks=pytest.mark.slow) for capability in (89, 120))]
)
def test_gpus_with_little_shared_memory(capability: int, tmp_path: Path) -> None:
    for report in _compile([f"{capability},{head_size},bf16,bf16" for head_size in (64, 128, 256)], tmp_path):
        _assert_fits(report)


@pytest.mark.parametrize("capability", [80, 90])
def test_gqa_groups_and_page_sizes(capability: int, tmp_path: Path) -> None:
    shapes = [(1, 16), (7, 16), (8, 48), (4, 64), (4, 128), (4, 784)]
    variants = [f"{capability},128,bf16,bf16,{group},{size}" for group, size in shapes]
    for report in _compile([*variants, f"{capability},128,bf16,bf16,4,16,200"], tmp_path):
        _assert_fits(report)
        assert report["matrix_instruction"] == MATRIX_INSTRUCTION[capability], report
        assert report["loop_waits"] <= 2, report


@pytest.mark.slow
@pytest.mark.parametrize("capability", [86, 89, 120])
def test_sparse_prefill_on_gpus_with_little_shared_memory(capability: int, tmp_path: Path) -> None:
    kernels = ("sparse-64", "sparse-128", *ESTIMATES)
    for report in _compile(
        [f"{capability},{d},bf16,bf16,{kernel}" for kernel in kernels for d in (128, 256)], tmp_path
    ):
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
    for report in _compile(variants, tmp_path):
        _assert_fits(report)
        assert report["matrix_instruction"] == MATRIX_INSTRUCTION[capability], report
        assert capability != 90 or 1 <= report["loop_waits"] <= 2, report


@pytest.mark.parametrize(
    "head_size", [pytest.param(64, marks=pytest.mark.slow), 128, pytest.param(256, marks=pytest.mark.slow)]
)
def test_fp32_stays_ieee(head_size: int, tmp_path: Path) -> None:
    """No tensor core: those would round fp32 to TF32."""
    kernels = ("prefill", "sparse-64", "sparse-128", *ESTIMATES)
    variants = [f"90,{head_size},fp32,fp32,{kernel}" for kernel in kernels]
    for report in _compile(variants, tmp_path):
        _assert_fits(report)
        assert report["matrix_instruction"] == "", report
