"""Tier G: every defect put into a copy of the sources fails one of the tests mapped to it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mutants import generated, hand
from tests.mutants.bench import ROOT, STORE, TIME_LIMIT, Bench, Mutant
from tests.mutants.forks import CRASH, SCENARIO
from tests.mutants.hand.patterns import PLAN
from tests.mutants.report import DOCS, row
from tests.tiers import Tier

HAND = {mutant.name: mutant for mutant in hand.MUTANTS}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """All mutants by hand in the full run, a few in the fast one."""
    if "defect" in metafunc.fixturenames:
        metafunc.parametrize("defect", HAND if metafunc.config.getoption("--full") else hand.FAST)


@pytest.fixture(scope="module")
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """A copy of the checkout; in the full run it goes on from what is known of the same sources."""
    full = request.config.getoption("--full")
    bench = Bench(tmp_path_factory.mktemp("mutants"), store=STORE if full else None)
    yield bench
    bench.close()


@pytest.mark.tier("G")
def test_a_mutant_by_hand_is_killed(bench: Bench, tier: Tier, defect: str) -> None:
    mutant = HAND[defect]
    outcome = bench.try_out(mutant.path, mutant.text, mutant.tests)
    assert outcome.killed_by, f"{mutant.tests} pass with it"
    tier.case(defect)


@pytest.mark.slow
@pytest.mark.tier("G")
@pytest.mark.parametrize("path", generated.TESTS)
@pytest.mark.timeout(1800)
def test_mutants_of_the_tool_are_killed_or_explained(bench: Bench, tier: Tier, path: str) -> None:
    pytest.importorskip("mutmut", reason="mutmut's operators make these mutants; it is in the extra `dev`")
    mutants = generated.mutants(path)
    assert mutants
    survivors = set()
    for mutant in mutants:
        if not bench.try_out(mutant.path, mutant.text, mutant.tests).killed_by:
            survivors.add(mutant.name)
        tier.case(mutant.name)
    # An explanation that no mutant needs any more is one too many.
    explained = {name for name in generated.EQUIVALENT if name.startswith(f"{path}:")}
    assert survivors == explained


@pytest.mark.parametrize("mutant", hand.MUTANTS, ids=lambda mutant: mutant.name)
def test_old_text_is_there_once(mutant: Mutant) -> None:
    """So that no mutant rots: it changes the file, which is still Python."""
    assert mutant.text != (ROOT / mutant.path).read_text()
    compile(mutant.text, mutant.path, "exec")
    assert mutant.tests
    for test in mutant.tests:
        if not test.startswith(SCENARIO):
            assert (ROOT / test.partition("::")[0]).exists(), test


def test_names_are_unique_and_many() -> None:
    assert len(HAND) == len(hand.MUTANTS) >= 30
    assert set(hand.FAST) <= HAND.keys()


def test_the_documented_table_is_these_mutants() -> None:
    """Each with a test that is mapped to it."""
    page = DOCS.read_text()
    lines = page[page.index("## By hand") : page.index("## By mutmut")].splitlines()
    found = [line for line in lines if line.startswith("| ")][1:]
    assert [line.rpartition(" | ")[0] for line in found] == [
        row(mutant.name, mutant.path, "x").rpartition(" | ")[0] for mutant in hand.MUTANTS
    ]
    for mutant, line in zip(hand.MUTANTS, found, strict=True):
        killer = line.rpartition(" | ")[2].strip("|` ")
        # What reads another step's memory crashes on one machine and hangs on another.
        assert killer in (CRASH, TIME_LIMIT) or any(killer.startswith(test.split("[")[0]) for test in mutant.tests), (
            line
        )


@pytest.mark.slow
def test_explanations_are_of_mutants_that_there_are() -> None:
    pytest.importorskip("mutmut", reason="mutmut's operators make these mutants; it is in the extra `dev`")
    names = {mutant.name for path in generated.TESTS for mutant in generated.mutants(path)}
    assert generated.EQUIVALENT.keys() <= names
    assert len(names) >= 30


def test_what_no_test_notices_survives(bench: Bench) -> None:
    """So that a kill means something; and neither the checkout nor the copy keeps a defect."""
    path = "vllm_trimix/plan.py"
    source = (ROOT / path).read_text()
    assert bench.try_out(path, f"{source}# Nothing.\n", (PLAN,)).killed_by == ""
    assert [(root / path).read_text() for root in (ROOT, bench.tree)] == [source, source]


def test_tests_that_fail_anyway_are_refused(bench: Bench, tmp_path: Path) -> None:
    failing = tmp_path / "test_failing.py"
    failing.write_text("def test_failing():\n    assert False\n")
    with pytest.raises(RuntimeError, match=r"on the sources as they are.*test_failing"):
        bench.try_out("vllm_trimix/plan.py", "", (str(failing),))


@pytest.mark.parametrize("old", ["no such text", "position"])
def test_a_text_that_is_not_there_once_is_refused(old: str) -> None:
    with pytest.raises(ValueError, match=r"occurs \d+ times in vllm_trimix/plan.py, must be once"):
        _ = Mutant("rotten", "vllm_trimix/plan.py", old, "", ()).text
