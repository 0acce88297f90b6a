"""Fixtures of several test files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.benchmarks.trivial import Trivial


@pytest.fixture
def trivial(tmp_path: Path) -> Trivial:
    """A command line around stages that do next to nothing."""
    return Trivial(tmp_path)
