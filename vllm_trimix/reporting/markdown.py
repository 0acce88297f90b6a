"""A report's Markdown as HTML that is safe whoever wrote it.

HTML in the Markdown is shown as text, links lead to the web or nowhere, pictures come from the report's own folder.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markdown_it import MarkdownIt
from markdown_it.token import Token

from vllm_trimix.reporting.pictures import NotShown, data_uri
from vllm_trimix.reporting.tables import is_numeric

_WEB = re.compile(r"(?:https?://|mailto:)", re.IGNORECASE)
# A section's own title is an h2.
_FIRST_LEVEL = 3


@dataclass(frozen=True)
class Rendered:
    """A Markdown file.

    Attributes:
        title: Its first heading, if it has one at the top or of the first level; that is not in the HTML.
        html: The rest, safe to stand in a page.
        pictures: Data URIs of the pictures in it.
        notes: What is not shown, and why.
    """

    title: str | None
    html: str
    pictures: set[str]
    notes: list[str]


def render(text: str, folder: Path) -> Rendered:
    """Renders a report.

    Args:
        text: Markdown.
        folder: Where it lies, with its pictures.
    """
    parser = MarkdownIt("commonmark", {"html": False, "xhtmlOut": False}).enable(["table", "strikethrough"])
    for name in ("image", "table_open", "table_close"):
        parser.add_render_rule(name, _RULES[name])
    tokens = parser.parse(text)
    title = _take_title(tokens)
    for token in tokens:
        if token.type in ("heading_open", "heading_close"):
            token.tag = f"h{min(6, max(_FIRST_LEVEL, int(token.tag[1]) + 1))}"
    _align(tokens)
    for token in tokens:
        _restrict_links(token.children or ())
    pictures: set[str] = set()
    notes: list[str] = []
    seen = {"folder": folder, "pictures": pictures, "notes": notes}
    return Rendered(title, parser.renderer.render(tokens, parser.options, seen), pictures, notes)


def _take_title(tokens: list[Token]) -> str | None:
    """Takes the title's heading out; a heading amid the text, below the first level, is none."""
    for index, token in enumerate(tokens):
        if token.type == "heading_open" and token.level == 0 and (index == 0 or token.tag == "h1"):
            title = _text(tokens[index + 1].children or ()).strip()
            if title:
                del tokens[index : index + 3]
                return title
    return None


def _text(tokens: Iterable[Token]) -> str:
    """What inline tokens say, without their form."""
    return "".join(
        _text(token.children) if token.children else token.content or " " * (token.type == "softbreak")
        for token in tokens
    )


def _align(tokens: Sequence[Token]) -> None:
    """Marks the columns of figures of each table."""
    cells: list[list[tuple[Token, str]]] = []
    for index, token in enumerate(tokens):
        if token.type == "tr_open":
            cells.append([])
        elif token.type in ("th_open", "td_open"):
            cells[-1].append((token, _text(tokens[index + 1].children or ())))
        elif token.type == "table_close":
            header, *rows = cells
            for column, (first, _) in enumerate(header):
                if is_numeric([row[column][1] for row in rows]):
                    for cell in (first, *(row[column][0] for row in rows)):
                        cell.attrJoin("class", "number")
            cells = []


def _restrict_links(tokens: Sequence[Token]) -> None:
    """Leaves links to the web; any other one becomes text that names its target. Folders don't travel with the page."""
    kept: list[bool] = []
    for token in tokens:
        if token.type == "link_open":
            target = str(token.attrs.get("href", ""))
            kept.append(_WEB.match(target) is not None)
            token.attrs = {"href": target, "rel": "noopener noreferrer"} if kept[-1] else {"title": target}
            token.tag = "a" if kept[-1] else "span"
        elif token.type == "link_close":
            token.tag = "a" if kept.pop() else "span"


def _image(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    token = tokens[index]
    source, alt = str(token.attrs.get("src", "")), _text(token.children or ())
    try:
        uri = data_uri(source, env["folder"])
    except NotShown as why:
        note = f"picture {source!r} {why}"
        env["notes"].append(note)
        return f'<span class="note">{html.escape(note)}</span>'
    env["pictures"].add(uri)
    return f'<img src="{uri}" alt="{html.escape(alt)}">'


def _table_open(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return '<div class="scroll" tabindex="0"><table>\n'


def _table_close(renderer: Any, tokens: Sequence[Token], index: int, options: Any, env: Any) -> str:
    return "</table></div>\n"


_RULES = {"image": _image, "table_open": _table_open, "table_close": _table_close}
