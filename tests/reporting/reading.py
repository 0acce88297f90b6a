"""A page of ``vllm-trimix report`` as a browser would take it in, and what no such page may hold."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from vllm_trimix.cli.main import main

VOID = {"meta", "img", "br", "hr"}
TAGS = VOID | set(
    "html head title style body header main nav section article h1 h2 h3 h4 h5 h6 p span div a ol ul li table caption "
    "thead tbody tr th td details summary pre figure figcaption code em strong s blockquote".split()
)
ATTRIBUTES = set(
    "lang charset name content http-equiv aria-label href id class tabindex scope src alt style title rel start".split()
)


class Page(HTMLParser):
    """A parsed page.

    Attributes:
        elements: Name and attributes of every element, in order.
        text: All text, style sheets left out.
        tables: [table][row][cell], as text.
        pre: Text of each ``pre``.
        css: The style sheets.
    """

    def __init__(self, raw: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.raw = raw
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.text, self.css = "", ""
        self.tables: list[list[list[str]]] = []
        self.pre: list[str] = []
        self._open: list[str] = []
        self.feed(raw.decode())
        self.close()
        assert self._open == [], "elements that nothing closes"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice in <{tag}>"
        self.elements.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("th", "td"):
            self.tables[-1][-1].append("")
        elif tag == "pre":
            self.pre.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        raise AssertionError(f"<{tag} /> is XHTML")

    def handle_endtag(self, tag: str) -> None:
        assert self._open, f"</{tag}> closes nothing"
        assert self._open.pop() == tag

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data!r}")

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            self.css += data
            return
        self.text += data
        if {"th", "td"} & set(self._open):
            self.tables[-1][-1][-1] += data
        if "pre" in self._open:
            self.pre[-1] += data

    def attributes(self, tag: str) -> list[dict[str, str]]:
        """Of all elements of a name."""
        return [attributes for name, attributes in self.elements if name == tag]

    def check(self) -> None:
        """Asserts that nothing in the page runs, and that nothing is fetched from elsewhere."""
        assert {tag for tag, _ in self.elements} <= TAGS
        assert {name for _, attributes in self.elements for name in attributes} <= ATTRIBUTES
        for image in self.attributes("img"):
            assert re.match(r"data:image/(png|jpeg|gif|webp);base64,[A-Za-z0-9+/]*=*$", image["src"]), image["src"][:80]
        for link in self.attributes("a"):
            assert re.match(r"#result-\d+$|https?://|mailto:", link["href"], re.IGNORECASE), link["href"]
        styles = [attributes["style"] for _, attributes in self.elements if "style" in attributes]
        assert all(re.fullmatch(r"text-align:(left|right|center)", style) for style in styles)
        assert not re.search(r"url\s*\(|@import|expression", self.css, re.IGNORECASE)
        policies = [meta["content"] for meta in self.attributes("meta") if "http-equiv" in meta]
        assert len(policies) == 1
        assert policies[0].startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def report(*results: Path, output: Path) -> Page:
    """The checked page that the command writes."""
    assert main(["report", *map(str, results), "--output", str(output)]) == 0
    page = Page(output.read_bytes())
    page.check()
    return page


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that the command ends with, status 2."""
    capsys.readouterr()
    assert main(["report", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("vllm-trimix: error: ")
    assert err.count("\n") == 1
    return err
