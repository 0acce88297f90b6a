"""What may not stand in any file of the repository."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FORBIDDEN = {
    # An index is a URL that ends in /simple, /whl or /whl/<flavour>, or one that an index option names.
    "a package index's address": re.compile(r"https?://\S+/(?:simple|whl)\b|--(?:extra-)?index-url[= ]\S*://"),
    "a path of one machine": re.compile(
        r"(?<![\w.])/(?:root|work|Users)/|/tmp/[a-z]/|/opt/(?!vllm-trimix)\w+|/home/(?!trimix)\w+/"
    ),
}


def _tracked() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        pytest.skip("not a git checkout: which files belong to the repository is unknown")
    return [ROOT / name for name in result.stdout.split("\0") if name and (ROOT / name).is_file()]


@pytest.mark.parametrize("what", FORBIDDEN)
def test_no_file_names(what: str) -> None:
    found = []
    for path in _tracked():
        try:
            text = path.read_text()
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in FORBIDDEN[what].finditer(text)]
    assert found == []


def test_scripts_are_executable() -> None:
    for name in (".ci/run", "scripts/install.sh"):
        assert (ROOT / name).stat().st_mode & 0o111, f"{name} is not executable"
