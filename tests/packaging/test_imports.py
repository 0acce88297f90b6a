"""Who imports what: nothing heavy with the package, no circles, and the borders that lint holds."""

from __future__ import annotations

import ast
import graphlib
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("vllm_trimix", "benchmarks")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("module", ["vllm_trimix", "vllm_trimix.plugin", "vllm_trimix.cli.main"])
def test_import_is_light(module: str) -> None:
    heavy = {"torch", "vllm", "triton", "transformers", "numpy"}
    code = f"import sys, {module}; print(*sorted({heavy!r} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""


def test_no_module_imports_itself_on_a_way_round() -> None:
    """Imports inside functions count too, and those for type checking."""
    grimp = pytest.importorskip("grimp", reason="import-linter brings it (extra dev)")
    graph = grimp.build_graph(*PACKAGES, cache_dir=None)
    circles = []
    for module in sorted(graph.modules):
        for imported in sorted(graph.find_modules_directly_imported_by(module)):
            if way := graph.find_shortest_chain(imported, module):
                circles.append((module, *way))
    assert circles == []


def test_no_header_includes_itself_on_a_way_round() -> None:
    folder = ROOT / "csrc"
    includes = {
        path.relative_to(ROOT): {
            (path.parent / name).resolve().relative_to(ROOT)
            for name in re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
        }
        for pattern in ("*.h", "*.cpp")
        for path in folder.rglob(pattern)
    }
    assert sum(map(len, includes.values())) > 10
    # Raises CycleError, with the circle.
    graphlib.TopologicalSorter(includes).prepare()


def _inner_imports(tree: ast.AST) -> Iterator[ast.stmt]:
    """Imports that run when a function does, the first of those that follow one another."""
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for block in ast.walk(function):
                for field in ("body", "orelse", "finalbody"):
                    before, statements = None, getattr(block, field, None)
                    for statement in statements if isinstance(statements, list) else []:
                        first = not isinstance(before, ast.Import | ast.ImportFrom)
                        if first and isinstance(statement, ast.Import | ast.ImportFrom):
                            yield statement
                        before = statement


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_an_import_inside_a_function_says_why(path: Path) -> None:
    """Above it stands a comment: what it imports is heavy, or may be missing."""
    lines = path.read_text().splitlines()
    for statement in _inner_imports(ast.parse(path.read_text())):
        above = lines[statement.lineno - 2].strip()
        assert above.startswith("#"), f"line {statement.lineno}: {lines[statement.lineno - 1].strip()}"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the contracts are about."""
    folder = tmp_path_factory.mktemp("borders")
    shutil.copy(ROOT / ".importlinter", folder)
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__", "*.so", "results")
        shutil.copytree(ROOT / package, folder / package, ignore=ignore)
    return folder


def _lint(checkout: Path) -> subprocess.CompletedProcess[str]:
    tool = Path(sys.executable).with_name("lint-imports")
    if not tool.exists():
        pytest.skip("import-linter is not installed beside this interpreter (extra dev)")
    command = [str(tool), "--no-cache", "--no-logo"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=False)


def test_the_contracts_are_kept(checkout: Path) -> None:
    result = _lint(checkout)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("place", "statement", "contract"),
    [
        ("backend", "import triton", "Only the kernels import Triton"),
        ("kernels", "import vllm.config", "Only the backend imports vLLM"),
        ("cli", "from vllm.config import VllmConfig", "Only the backend imports vLLM"),
        ("patterns", "from vllm_trimix.kernels import reference", "Commands on what helps"),
        ("kernels", "from vllm_trimix.config import entry", "Commands on what helps"),
        ("evaluation", "from vllm_trimix.searching import search", "Commands on what helps"),
        ("backend", "from vllm_trimix.measurement import hardware", "What serves knows nothing"),
        ("backend/engines", "from vllm_trimix.evaluation import sample", "What serves knows nothing"),
        ("probing", "from vllm_trimix.backend import compat", "What helps starts engines"),
        ("stats", "from benchmarks import models", "The package stands without its benchmarks"),
        ("../benchmarks/kernels", "from benchmarks.serving import rows", "Benchmarks are commands"),
        # Inside a function counts too.
        ("patterns/a_shape", "def f():\n    from vllm_trimix.patterns import registry", "No circles"),
        ("new", "", "Commands on what helps"),
    ],
    ids=lambda value: value.split("\n")[-1].strip() or "a new module" if isinstance(value, str) else None,
)
def test_lint_guards_the_borders(checkout: Path, place: str, statement: str, contract: str) -> None:
    target = checkout / "vllm_trimix" / place
    file = target / "example.py" if target.is_dir() else target.with_suffix(".py")
    before = file.read_text() if file.exists() else None
    try:
        file.write_text(f"{before or ''}\n{statement}\n")
        result = _lint(checkout)
    finally:
        file.unlink() if before is None else file.write_text(before)
    assert result.returncode == 1, result.stdout
    broken = [line for line in result.stdout.splitlines() if line.endswith("BROKEN")]
    assert [line for line in broken if line.startswith(contract)], result.stdout
