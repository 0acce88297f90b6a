"""CONTRIBUTING.md's recipes: the files to touch exist, hold what is named, and know the example."""

from __future__ import annotations

import re

import pytest

from tests.docs.reading import ROOT, bullets, section
from vllm_trimix.backend.announce import REASONS
from vllm_trimix.cli.main import COMMANDS
from vllm_trimix.evaluation.suites.registry import SUITES
from vllm_trimix.patterns.registry import PATTERNS

KINDS = {
    "A dynamic pattern": set(PATTERNS),
    "A Triton kernel": {path.stem for path in (ROOT / "vllm_trimix/kernels").rglob("triton_*.py")},
    "A suite of the evaluation": set(SUITES),
    "A command": set(COMMANDS),
    "A reason to stay dense": set(REASONS),
}


def _recipe(kind: str) -> tuple[str, list[tuple[str, list[str]]]]:
    """The example, and for each item its path and the identifiers that it names."""
    text = section("CONTRIBUTING.md", f"### {kind}")
    (example,) = re.findall(r"\bExample: `([\w-]+)`\.", text)
    steps = []
    for item in bullets(text):
        match = re.match(r"`([\w./-]+)`: (.*)$", item)
        assert match, f"{item!r}: an item is a path, a colon, and what to do there"
        code = re.findall(r"`([^`]+)`", match[2])
        steps.append((match[1], [name for name in code if re.fullmatch(r"_*[A-Za-z]\w*", name)]))
    return example, steps


def test_there_is_a_recipe_for_every_kind() -> None:
    assert re.findall(r"^### (.*)$", section("CONTRIBUTING.md", "## Recipes"), re.M) == list(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_an_example_is_in_every_file_of_its_recipe(kind: str) -> None:
    example, steps = _recipe(kind)
    assert example in KINDS[kind]
    assert len(steps) >= 4
    for path, names in steps:
        file = ROOT / path.replace("NAME", example.replace("-", "_") if path.endswith(".py") else example)
        assert file.is_file(), path
        text = file.read_text()
        assert example in file.name or example in text, f"{path} knows no {example}"
        assert [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)] == [], path
