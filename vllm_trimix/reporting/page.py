"""The page: a section a result, in one file that needs nothing else."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from vllm_trimix.reporting.facts import facts, summary
from vllm_trimix.reporting.markdown import Rendered, render
from vllm_trimix.reporting.overlays import View, view
from vllm_trimix.reporting.pictures import NotShown, data_uri
from vllm_trimix.reporting.sources import Data, Result

GENERATOR = '<meta name="generator" content="vllm-trimix report">'
"""By which a page of ours is known, at its top."""

MAX_LETTERS = 40_000
"""Of a JSON file in the page. All of it would make a page of many samples slow, and nobody reads them there."""


@dataclass(frozen=True)
class Facts:
    """Where results come from.

    Attributes:
        names: Of the files that say so.
        found: Fact -> text.
    """

    names: list[str]
    found: dict[str, str]


@dataclass(frozen=True)
class Raw:
    """A JSON file as it is.

    Attributes:
        name: Of the file.
        text: Its first letters.
        letters: Of the whole.
    """

    name: str
    text: str
    letters: int


@dataclass(frozen=True)
class Section:
    """A result.

    Attributes:
        title: Its Markdown's, else its name.
        label: Its path.
        summary: Hardware, date and commit.
        pages: Its Markdown as HTML.
        pictures: Those of its pictures that its Markdown doesn't show: name and data URI.
        views: JSON file -> tables; only without Markdown.
        facts: Where it comes from.
        raw: Its JSON.
        notes: What is not shown, and why.
    """

    title: str
    label: str
    summary: str
    pages: list[Markup]
    pictures: list[tuple[str, str]]
    views: list[tuple[str, View]]
    facts: list[Facts]
    raw: list[Raw]
    notes: list[str]


def section(result: Result) -> Section:
    """The section of a result.

    Raises:
        OSError: A file that can't be read.
    """
    texts = [(result.folder / name).read_bytes().decode("utf-8-sig", "replace") for name in result.pages]
    pages = [render(text, result.folder) for text in texts]
    pictures, unseen = _other_pictures(result, pages)
    known = _facts(result.data)
    return Section(
        title=next((page.title for page in pages if page.title), result.name),
        label=result.label,
        summary=next(filter(None, (summary(item.found) for item in known)), ""),
        # Safe by markdown.render; everything else is escaped by the template.
        pages=[Markup(page.html) for page in pages],
        pictures=pictures,
        views=[] if pages else [(item.name, view(item.value)) for item in result.data],
        facts=known,
        raw=[Raw(item.name, item.text[:MAX_LETTERS], len(item.text)) for item in result.data],
        notes=list(dict.fromkeys([*result.notes, *(note for page in pages for note in page.notes), *unseen])),
    )


def _other_pictures(result: Result, pages: Sequence[Rendered]) -> tuple[list[tuple[str, str]], list[str]]:
    """Pictures of a folder that no Markdown shows, and what can't be shown of them."""
    found, notes = [], []
    shown = {uri for page in pages for uri in page.pictures}
    for name in result.pictures:
        try:
            uri = data_uri(quote(name), result.folder)
        except NotShown as why:
            notes.append(f"picture {name!r} {why}")
            continue
        if uri not in shown:
            found.append((name, uri))
    return found, notes


def _facts(data: Sequence[Data]) -> list[Facts]:
    """The facts of all files; those that say the same stand together."""
    known: list[Facts] = []
    for item in data:
        found = facts(item.value)
        same = next((other for other in known if other.found == found), None)
        if same is not None:
            same.names.append(item.name)
        elif found:
            known.append(Facts([item.name], found))
    return known


def html(sections: Sequence[Section]) -> bytes:
    """The page. The same sections give the same bytes."""
    page = _template().render(sections=sections, generator=Markup(GENERATOR), max_letters=MAX_LETTERS)
    # File names and JSON may hold half of a pair of surrogates, which UTF-8 has not.
    return page.encode("utf-8", "backslashreplace")


@functools.cache
def _template() -> Template:
    environment = Environment(
        loader=PackageLoader("vllm_trimix.reporting", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html")


def check_output(output: Path) -> None:
    """Refuses a place where the page can't or shouldn't be written.

    Raises:
        ValueError: A folder, a name without .html, a file that is no page of ours.
        OSError: The folder is missing or can't be written to.
    """
    if output.is_dir():
        raise ValueError(
            f"--output: {str(output)!r} is a folder; name a file in it, e.g. {str(output / 'report.html')!r}"
        )
    if output.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output: {str(output)!r} must end in .html")
    if output.exists() and not _is_ours(output):
        raise ValueError(
            f"--output: {str(output)!r} exists and is no page of vllm-trimix report; choose another name, or remove it"
        )
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise OSError(f"--output: cannot write to the folder {str(output.parent)!r}: {error.strerror}") from None


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return GENERATOR.encode() in file.read(1024)


def write(page: bytes, output: Path) -> None:
    """Writes the file whole or not at all."""
    part = output.with_name(f".{output.name}.part")
    try:
        part.write_bytes(page)
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
