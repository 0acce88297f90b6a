"""The pages that tests read, and how a list or a table is taken out of one."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
_PATHS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "csrc/README.md")),
    *ROOT.glob("docs/*.md"),
    *ROOT.glob("benchmarks/**/*.md"),
]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(_PATHS)}
README = PAGES["README.md"]


def section(page: str, heading: str) -> str:
    """What follows a heading such as ``## Keys``, up to the next one of its rank or a higher one."""
    rank = len(heading) - len(heading.lstrip("#"))
    (text,) = re.findall(rf"^{re.escape(heading)}\n(.*?)(?=^#{{1,{rank}}} |\Z)", PAGES[page], re.M | re.S)
    return str(text)


def prose(text: str) -> str:
    """Text on one line, so that it can be searched wherever its lines are broken."""
    return " ".join(text.split())


def code_blocks(page: str, language: str) -> list[str]:
    """The page's code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.M | re.S)


def rows(text: str) -> list[list[str]]:
    """Cells of the rows of a text's tables, headings left out."""
    found = []
    lines = text.splitlines()
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        if line.startswith("|") and not re.match(r"^\|[-|]+$", line) and not re.match(r"^\|[-|]+$", following):
            found.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def bullets(text: str) -> list[str]:
    """A text's list items, each on one line."""
    items = re.findall(r"^- (.*(?:\n  .*)*)", text, re.M)
    return [prose(item) for item in items]
