"""Every launch at a million tokens keeps to the limits of every GPU; recorded on the meta device, run on none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels need Triton (Linux)")
pytest.importorskip("vllm", reason="the steps are planned by the package's builder, which vLLM's classes are behind")

from tests.kernels.interpreter import compiler_pool
from tests.launches import cases, limits, table, worker
from tests.launches.situations import Situation

ROOT = Path(__file__).parents[2]
# A tile of 64 heads of 256 in fp32 with little shared memory, and on Hopper a pattern that estimates.
FAST_COMPILED = (5, 18)
PAGE = (ROOT / "docs/launches.md").read_text()
Found = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def compiler() -> Iterator[ProcessPoolExecutor]:
    """A process in which Triton would compile."""
    with compiler_pool() as pool:
        yield pool


def examine(compiler: ProcessPoolExecutor, situations: list[Situation]) -> Found:
    """Findings by situation."""
    return dict(zip(map(str, situations), compiler.map(worker.examine, situations), strict=True))


def wrong(found: Found) -> dict[str, list[str]]:
    """The situations that have problems."""
    return {name: each["problems"] for name, each in found.items() if each["problems"]}


def compile_all(compiler: ProcessPoolExecutor, situations: Sequence[Situation]) -> list[dict[str, Any]]:
    """What the situations' kernels need."""
    return [report for each in compiler.map(worker.compile_kernels, situations) for report in each]


def unfit(reports: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Kernels that need what their GPU has not."""
    return [report for report in reports if report["problems"]]


def test_every_two_values_meet_within_the_limits(compiler: ProcessPoolExecutor) -> None:
    found = examine(compiler, cases.pairs())
    assert len(found) > 50
    assert wrong(found) == {}
    # Room for prompts 500 times as long.
    assert max(each["largest"] for each in found.values()) * 500 < 2**31


def test_patterns_launch_within_the_limits(compiler: ProcessPoolExecutor) -> None:
    assert wrong(examine(compiler, cases.pattern_sample())) == {}


@pytest.mark.parametrize("pattern", ["", *cases.PATTERNS])
def test_a_second_step_copies_nothing_but_its_plan(compiler: ProcessPoolExecutor, pattern: str) -> None:
    """In slabs of several KV heads, whose size no warm-up knew; the first such step keeps their parameters."""
    situation = Situation("end16k", (32, 8), pattern=pattern)
    found = compiler.submit(worker.examine_again, situation).result()
    assert found["problems"] == []
    assert found["second"] == []


def test_wide_kernels_fit(compiler: ProcessPoolExecutor) -> None:
    reports = compile_all(compiler, [cases.compiled()[place] for place in FAST_COMPILED])
    assert len(reports) >= 4
    assert unfit(reports) == []


def test_the_documented_launches_are_those_recorded(compiler: ProcessPoolExecutor) -> None:
    found = [compiler.submit(worker.examine, situation).result() for situation in table.situations()]
    assert [each["problems"] for each in found] == [[]] * len(found)
    assert table.recorded(found) in PAGE, "docs/launches.md: run python -m tests.launches.table --recorded"


@pytest.mark.slow
def test_all_shapes_launch_within_the_limits(compiler: ProcessPoolExecutor) -> None:
    found = examine(compiler, cases.product_of_shapes())
    assert len(found) == len(cases.TRIANGLE_STEPS) * 4 * 4 * 7 * 7
    assert wrong(found) == {}


@pytest.mark.slow
def test_the_extremes_launch_within_the_limits(compiler: ProcessPoolExecutor) -> None:
    assert wrong(examine(compiler, cases.extremes())) == {}


@pytest.mark.slow
def test_patterns_of_every_two_values_launch_within_the_limits(compiler: ProcessPoolExecutor) -> None:
    assert wrong(examine(compiler, cases.pattern_pairs())) == {}


@pytest.mark.slow
def test_every_compiled_kernel_fits(compiler: ProcessPoolExecutor) -> None:
    """As Triton would compile them at the launch; the documented table is of them."""
    reports = compile_all(compiler, cases.compiled())
    assert unfit(reports) == []
    assert table.compiled(reports) in PAGE, "docs/launches.md: run python -m tests.launches.table"


DEFECTS = (
    "split",
    "grid",
    "first-query",
    "query-stride",
    "served-otherwise",
    "positions",
    "table",
    "warm-up",
    "key",
    "copy",
    "stream",
    "launches",
    "host",
)


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_is_seen(compiler: ProcessPoolExecutor, defect: str) -> None:
    expected = compiler.submit(worker.defects).result()
    assert set(expected) == set(DEFECTS)
    assert expected[defect] in compiler.submit(worker.seen, defect).result()


@pytest.mark.parametrize("need", [{"shared_bytes": 99 * 1024 + 1}, {"registers": 255, "num_warps": 16}])
def test_a_kernel_that_does_not_fit_is_seen(need: dict[str, int]) -> None:
    fits = {"shared_bytes": 99 * 1024, "registers": 255, "num_warps": 8}
    assert limits.unfit(fits, capability=89) == []
    assert len(limits.unfit({**fits, **need}, capability=89)) == 1
