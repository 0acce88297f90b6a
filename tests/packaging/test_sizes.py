"""No file is longer than a reader takes in: beyond its limit it has a seam at which it splits."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Lines of a file, by the folder that decides: the deepest that names it.
LIMITS = {"vllm_trimix": 300, "benchmarks": 300, "scripts": 300, "vllm_trimix/kernels": 500, "csrc": 500, "tests": 350}
CODE = (".py", ".sh", ".cpp", ".h", ".html", ".css")
GENERATED = ("benchmarks/results", "tests/data")


def _inside(path: Path, folders: tuple[str, ...] | dict[str, int]) -> list[str]:
    """Those folders that hold the path, from the shortest name to the longest."""
    return sorted((folder for folder in folders if path.is_relative_to(folder)), key=len)


def sizes(root: Path) -> dict[str, dict[Path, int]]:
    """Lines of every file of code, by the folder whose limit holds for it."""
    found: dict[str, dict[Path, int]] = {folder: {} for folder in LIMITS}
    for top in sorted({folder.split("/")[0] for folder in LIMITS}):
        for path in sorted((root / top).rglob("*")):
            name = path.relative_to(root)
            if path.suffix in CODE and path.is_file() and not _inside(name, GENERATED):
                found[_inside(name, LIMITS)[-1]][name] = len(path.read_text().splitlines())
    return found


@pytest.mark.parametrize("folder", LIMITS)
def test_no_file_is_too_long(folder: str) -> None:
    files = sizes(ROOT)[folder]
    assert files
    too_long = [f"{path}: {lines} lines" for path, lines in files.items() if lines > LIMITS[folder]]
    assert too_long == [], f"split them where a seam is: at most {LIMITS[folder]} lines"


def test_the_deepest_folder_decides_and_data_has_no_limit(tmp_path: Path) -> None:
    lengths = {
        "vllm_trimix/plan.py": 301,
        "vllm_trimix/kernels/reference.py": 301,
        "tests/plan/test_plan.py": 351,
        "tests/data/made.py": 999,
        "benchmarks/results/run/notes.py": 999,
        "csrc/a/b.h": 500,
        "csrc/a/notes.md": 999,
    }
    for name, lines in lengths.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("\n" * lines)
    found = sizes(tmp_path)
    assert {folder: {str(path): lines for path, lines in files.items()} for folder, files in found.items()} == {
        "vllm_trimix": {"vllm_trimix/plan.py": 301},
        "vllm_trimix/kernels": {"vllm_trimix/kernels/reference.py": 301},
        "tests": {"tests/plan/test_plan.py": 351},
        "csrc": {"csrc/a/b.h": 500},
        "benchmarks": {},
        "scripts": {},
    }
