"""Pages that can be found and read: the map names each, each says what for, none is too long."""

from __future__ import annotations

import re

import pytest

from tests.docs.reading import PAGES, README, bullets

DOCS = {name.removeprefix("docs/"): text for name, text in PAGES.items() if name.startswith("docs/")}
# Pages that programs write, in whole or for the most part.
GENERATED = {"bounds.md", "is-it-lossless.md", "kernel-tables.md", "models.md", "mutants.md"}
MAX_LINES, MAX_README_LINES = 150, 170
MAX_PROSE, MAX_README_PROSE = 300, 250


def test_the_map_names_every_page() -> None:
    named = [re.match(r"\[([\w-]+\.md)\]\(\1\): \w.*\. For whoever .*\.$", item) for item in bullets(DOCS["README.md"])]
    assert None not in named, "a line is: a link, what is there, for whom"
    pages = [match[1] for match in named if match is not None]
    assert len(pages) == len(set(pages))
    assert set(pages) == DOCS.keys() - {"README.md"}


def test_the_readme_leads_to_the_map() -> None:
    assert "(docs/README.md)" in README


@pytest.mark.parametrize("name", DOCS)
def test_a_page_begins_with_what_it_is_for(name: str) -> None:
    heading, opening, *_ = DOCS[name].split("\n\n")
    assert heading.startswith("# ")
    assert "\n" not in heading
    assert re.match(r"[A-Z*]", opening), opening
    assert opening.rstrip("*").endswith((".", ":")), opening
    if name != "mutants.md":
        assert re.search(r"[Ff]or\s+whoever\s", opening), opening


def test_generated_pages_say_so() -> None:
    for name in GENERATED:
        assert re.search(r"generated|writes this page", DOCS[name].split("\n## ")[0]), name


@pytest.mark.parametrize("name", DOCS)
def test_no_page_is_too_long(name: str) -> None:
    lines = DOCS[name].splitlines()
    assert name in GENERATED or len(lines) <= MAX_LINES, f"{len(lines)} lines: split it by topic"
    long = [line for line in _prose(lines) if len(line) > MAX_PROSE]
    assert long == []


def test_the_readme_is_short() -> None:
    lines = README.splitlines()
    assert len(lines) <= MAX_README_LINES, f"{len(lines)} lines: move reference to docs/"
    assert [line for line in lines if len(line) > MAX_README_PROSE] == []


def test_the_readme_says_first_what_comes_first() -> None:
    assert re.findall(r"^## (.*)$", README, re.M) == [
        "Limits first",
        "Install",
        "Serve",
        "Time to first token",
        "Is it lossless?",
        "Choosing layers",
        "Where to read on",
    ]
    opening, figure = README.split("\n\n")[1:3]
    assert len(re.findall(r"\.(?:\s|$)", opening)) == 1, "one sentence"
    assert figure.startswith("![")


def _prose(lines: list[str]) -> list[str]:
    """Lines outside of tables and generated parts."""
    kept, generated = [], False
    for line in lines:
        generated = line.startswith("<!-- generated") or (generated and not line.startswith("<!-- end"))
        if not generated and not line.startswith("|"):
            kept.append(line)
    return kept
