"""``make test-full``: what runs, what is run again, what fails it; and ``--tier``. With two tiers of stand-in tests."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]

# Each test leaves its name in a file: what ran is known whatever is printed.
TESTS = """
import json, os, time
from pathlib import Path
import pytest

PLAN = json.loads(Path("plan.json").read_text())

def ran(name):
    with Path("ran").open("a") as file:
        file.write(name)

@pytest.mark.tier("A")
def test_a(tier):
    ran("A" if tier.size(sample=0, full=1) else "a")
    time.sleep(PLAN.get("sleep", 0))
    for case in range(PLAN.get("cases", 20)):
        tier.case(case, cached=case < PLAN.get("cached", 2))
    assert not PLAN.get("fail")

@pytest.mark.tier("B")
def test_b(tier):
    ran("B" if tier.size(sample=0, full=1) else "b")
    tier.case(1, triangle=True)

@pytest.mark.slow
def test_slow():
    ran("S")

def test_plain():
    ran("p")
"""

PLAIN = {
    "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    "PYTEST_ADDOPTS": "-p pytest_timeout -p xdist.plugin",
    "TEST_WORKERS": "0",
}
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What the run needs, with stand-in tests of two tiers; a checkout of its own."""
    if shutil.which("git") is None:
        pytest.skip("no git on the PATH: what is a source of a checkout is git's to say")
    for name in ("Makefile", "pyproject.toml", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for name in ("__init__.py", "conftest.py", "tiers.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests")
    with (tmp_path / "tests/tiers.py").open("a") as file:
        file.write('\nfor _name in set(TIERS) - set("AB"):\n    del TIERS[_name]\n')
    (tmp_path / "tests/test_stand_in.py").write_text(TESTS)
    (tmp_path / ".gitignore").open("a").write("/plan.json\n/ran\n")
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def environment() -> dict[str, str]:
    """Without what other packages add to pytest: it starts some twenty times."""
    dropped = ("MAKEFLAGS", "MAKELEVEL", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if name not in dropped} | PLAIN


@pytest.fixture
def run(checkout: Path) -> Run:
    """Runs everything that has not passed under a plan; the names of what ran are its ``ran``."""

    def run(*arguments: str, command: str = "scripts/test_full.py", workers: str = "0", **plan: int) -> Any:
        (checkout / "plan.json").write_text(json.dumps(plan))
        (checkout / "ran").write_text("")
        result: Any = subprocess.run(
            [sys.executable, *command.split(), *arguments],
            cwd=checkout,
            env=environment() | {"TEST_WORKERS": workers},
            capture_output=True,
            text=True,
            timeout=120,
        )
        result.ran = (checkout / "ran").read_text()
        return result

    return run


def tiers(checkout: Path) -> dict[str, Any]:
    found = json.loads((checkout / "build/tiers.json").read_text())
    assert isinstance(found, dict)
    return found


def test_all_stages_once_for_the_same_sources(checkout: Path, run: Run) -> None:
    first: Any = run()
    assert (first.returncode, first.ran) == (0, "ABS"), first.stdout
    report = tiers(checkout)
    assert {name: (entry["cases"], entry["full"]) for name, entry in report.items()} == {
        "A": (20, True),
        "B": (1, True),
    }
    # Samples, as `make test` runs them, replace what the file says until the next full run.
    sample: Any = run("-m", "not slow", command="-m pytest")
    assert (sample.returncode, sample.ran) == (0, "abp"), sample.stdout
    assert not tiers(checkout)["A"]["full"]
    again: Any = run()
    assert (again.returncode, again.ran) == (0, ""), again.stdout
    assert "tier A: passed before on these sources" in again.stdout
    assert tiers(checkout) == report
    # An argument asks for a run of its own, which changes nothing of what is known.
    chosen: Any = run("-k", "test_b")
    assert (chosen.returncode, chosen.ran) == (0, "B"), chosen.stdout
    assert (run().ran, tiers(checkout)) == ("", report)
    # A file that git would track is a source, one that it ignores is not.
    (checkout / "build/other").touch()
    assert run().ran == ""
    (checkout / "tests/new.py").touch()
    assert run().ran == "ABS"


def test_workers_add_up(checkout: Path, run: Run) -> None:
    """The same report from two processes as from one; a case that both checked counts once."""
    tests = checkout / "tests/test_stand_in.py"
    again = '\n@pytest.mark.tier("A")\ndef test_{}(tier):\n    tier.case({}, cached=True)\n'
    tests.write_text(tests.read_text() + again.format("c", 0) + again.format("d", 20) + again.format("e", 21))
    alone: Any = run()
    expected = tiers(checkout)
    assert (alone.returncode, expected["A"]["cases"], expected["A"]["shares"]) == (0, 22, {"cached": 0.1818})
    # Another source, so that they run again.
    (checkout / "tests/new.py").touch()
    together: Any = run(workers="2")
    assert together.returncode == 0, together.stdout
    assert "2 workers" in together.stdout
    found = tiers(checkout)
    for entry in (*expected.values(), *found.values()):
        del entry["seconds"]
    assert found == expected


@pytest.mark.parametrize(
    ("plan", "line"),
    [
        ({"fail": 1}, "tier A: 20 cases in .* s, pytest ended with status 1"),
        ({"cases": 0}, "tier A: 0 cases in .* s, no case was checked: its tests are missing, skipped or report none"),
        ({"cached": 1}, r"tier A: .*'cached' holds in 5.0% of the cases that it applies to, less than 10%"),
    ],
    ids=["failure", "no-cases", "rare-fact"],
)
def test_what_fails_it(run: Run, plan: dict[str, int], line: str) -> None:
    """The other stages run all the same, and only the one that failed runs again."""
    result: Any = run(**plan)
    assert (result.returncode, result.ran) == (1, "ABS"), result.stdout
    summary = result.stdout[result.stdout.index("test-full: FAILED") :]
    assert re.search(line, summary), summary
    again: Any = run()
    assert (again.returncode, again.ran) == (0, "A"), again.stdout


def test_a_tier_without_tests_fails_it(checkout: Path, run: Run) -> None:
    tests = checkout / "tests/test_stand_in.py"
    tests.write_text(tests.read_text().replace('tier("B")', 'tier("A")'))
    result: Any = run()
    assert result.returncode == 1
    assert "tier B: " in result.stdout
    assert "no case was checked" in result.stdout


def test_an_interrupted_run_goes_on_where_it_was(checkout: Path, run: Run) -> None:
    tests = checkout / "tests/test_stand_in.py"
    # The second tier takes its time.
    tests.write_text(
        tests.read_text().replace(
            "    tier.case(1, triangle=True)", '    time.sleep(PLAN.get("wait", 0))\n    tier.case(1)'
        )
    )
    (checkout / "plan.json").write_text(json.dumps({"wait": 60}))
    (checkout / "ran").touch()
    with subprocess.Popen(
        [sys.executable, "scripts/test_full.py"],
        cwd=checkout,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        deadline = time.monotonic() + 60
        while "B" not in (checkout / "ran").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGINT)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "stopped in tier B; the next run goes on there" in output
    again: Any = run()
    assert (again.returncode, again.ran) == (0, "BS"), again.stdout


def test_make_runs_lint_then_the_stages(checkout: Path) -> None:
    """``make test`` samples the tiers, ``make test-full`` runs them whole; lint's failure is its own."""
    binaries = checkout / ".venv/bin"
    binaries.mkdir(parents=True)
    # The Makefile unsets pytest's options: they are set again here.
    options = " ".join(f"{name}='{environment()[name]}'" for name in PLAIN)
    (binaries / "python").write_text(f'#!/bin/sh\nexec env {options} {sys.executable} "$@"\n')
    linters = ("ruff", "mypy", "lint-imports")
    for name in linters:
        (binaries / name).write_text("#!/bin/sh\nexit $(cat lint-status)\n")
    for name in ("python", *linters):
        (binaries / name).chmod(0o755)
    for stamp in (".installed", ".installed-dev"):
        (checkout / ".venv" / stamp).touch()
    (checkout / "plan.json").write_text("{}")

    def make(target: str, lint_status: int) -> tuple[int, str]:
        (checkout / "lint-status").write_text(str(lint_status))
        (checkout / "ran").write_text("")
        result = subprocess.run(
            ["make", target], cwd=checkout, env=environment(), capture_output=True, text=True, timeout=120
        )
        return result.returncode, (checkout / "ran").read_text()

    assert make("test", 0) == (0, "abp")
    assert make("test-full", 0) == (0, "ABS")
    assert make("test-full", 1)[0] != 0


def test_a_folder_without_git_has_a_key_too(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """As an unpacked archive; inside another checkout, which ignores it, above all."""
    code = "from scripts.test_full import source_key; from pathlib import Path; print(source_key(Path('.').resolve()))"

    def key() -> str:
        result = subprocess.run([sys.executable, "-c", code], cwd=checkout, capture_output=True, text=True, check=True)
        return result.stdout

    shutil.rmtree(checkout / ".git")
    first = key()
    assert len(first.strip()) == 64
    (checkout / "build").mkdir(exist_ok=True)
    (checkout / "build/other").touch()
    assert key() == first
    (checkout / "Makefile").open("a").write("\n")
    assert key() != first


def test_tier_chooses(run: Run) -> None:
    assert [run("--tier", name, command="-m pytest").ran for name in ("A", "none")] == ["a", "Sp"]
    assert run("--tier", "Z", command="-m pytest").returncode == 4
