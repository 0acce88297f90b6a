"""Which files of the named folders are results, and what the JSON among them holds."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MAX_FOLDERS = 1000
"""Folders that are looked through below one that was named: a whole disk named by mistake ends soon."""

MAX_BYTES = 32 * 2**20
"""Of a text file. Larger ones hold traces or models, no report."""

_LOOKS = (
    "a result is a folder with a report in Markdown, or JSON that names its 'environment' or 'provenance', as "
    "vllm-trimix calibrate, eval, probe and search and the benchmarks write them"
)
_PICTURES = (".png", ".jpg", ".jpeg", ".gif", ".webp")
_MARKS = ("environment", "provenance", "versions")


@dataclass(frozen=True)
class Data:
    """A JSON file.

    Attributes:
        name: Of the file.
        value: What it holds.
        text: The same, indented, lists of numbers on one line each.
    """

    name: str
    value: Any
    text: str

    @property
    def is_result(self) -> bool:
        """Whether it says of itself what was measured on what."""
        return isinstance(self.value, dict) and any(isinstance(self.value.get(mark), dict) for mark in _MARKS)

    @property
    def is_progress(self) -> bool:
        """Whether it is what an unfinished probe or search goes on from."""
        return isinstance(self.value, dict) and self.value.keys() == {"settings", "results"}


@dataclass(frozen=True)
class Result:
    """A folder with results, or one JSON file.

    Attributes:
        label: Its path, seen from the folder above the one that was named.
        folder: Where its files lie; nothing outside is read.
        pages: Markdown files' names.
        pictures: Picture files' names.
        data: JSON files.
        notes: What was left out, and why.
    """

    label: str
    folder: Path
    pages: tuple[str, ...] = ()
    pictures: tuple[str, ...] = ()
    data: tuple[Data, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's or file's own name."""
        return self.label.rpartition("/")[2]


def find(paths: Sequence[Path]) -> list[Result]:
    """The results in the named places, in their order, each once; below a folder by name.

    Raises:
        ValueError: A place that doesn't exist or holds no result, broken JSON, too many folders.
        OSError: Something that can't be read.
    """
    found: dict[Path, Result] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"no such folder: {str(path)!r}")
        results = list(_folders(path)) if path.is_dir() else [_file(path)]
        if not results:
            raise ValueError(f"no results in {str(path)!r}; {_LOOKS}")
        for result in results:
            place = result.folder.resolve() / ("" if path.is_dir() else result.name)
            found.setdefault(place, result)
    return list(found.values())


def _file(path: Path) -> Result:
    """A JSON file that was named itself."""
    if path.suffix.lower() != ".json" or not path.is_file():
        raise ValueError(f"{str(path)!r} is neither a folder nor a .json file; name the folder that holds the results")
    data = _load(path)
    if not data.is_result:
        raise ValueError(f"{str(path)!r} is not a result: it names no 'environment' or 'provenance'; {_LOOKS}")
    return Result(path.name, path.parent, data=(data,))


def _folders(root: Path) -> Iterator[Result]:
    """Results in a folder and below; hidden folders and links to folders are passed over."""
    top = root.resolve()
    for count, (folder, below, names) in enumerate(os.walk(top, onerror=_fail), 1):
        if count > MAX_FOLDERS:
            raise ValueError(
                f"{str(root)!r} holds more than {MAX_FOLDERS} folders, the limit; name the results' own folders"
            )
        below[:] = sorted(name for name in below if not name.startswith("."))
        here = Path(folder)
        label = (Path(top.name) / here.relative_to(top)).as_posix()
        result = _folder(here, label, sorted(name for name in names if not name.startswith(".")))
        if result is not None:
            yield result


def _folder(folder: Path, label: str, names: Sequence[str]) -> Result | None:
    notes: list[str] = []
    pages = [name for name in names if name.lower().endswith(".md") and _is_ours(folder, name, notes)]
    # The report before what stands beside it.
    pages.sort(key=lambda name: (name != "report.md", name))
    files = [name for name in names if name.lower().endswith(".json") and _is_ours(folder, name, notes)]
    data = [item for item in (_load(folder / name) for name in files) if not item.is_progress]
    if not pages and not any(item.is_result for item in data):
        return None
    pictures = [name for name in names if name.lower().endswith(_PICTURES) and _is_ours(folder, name, notes)]
    return Result(label, folder, tuple(pages), tuple(pictures), tuple(data), notes)


def _is_ours(folder: Path, name: str, notes: list[str]) -> bool:
    """Whether a file is a plain one of its folder: a link could bring any file of the reader's into the page."""
    path = folder / name
    if not is_inside(path, folder):
        notes.append(f"{name!r} is a link out of the folder and was left out")
        return False
    if path.exists() and not path.is_file():
        return False
    if path.stat().st_size > MAX_BYTES:
        notes.append(f"{name!r} is larger than {MAX_BYTES // 2**20} MiB, the limit, and was left out")
        return False
    return True


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, ends in a folder."""
    try:
        return path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError):
        # Loops of links, names that no file can have.
        return False


def _load(path: Path) -> Data:
    """Reads a JSON file.

    Raises:
        ValueError: It is none.
    """
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
        text = json.dumps(value, indent=1, ensure_ascii=False)
    except RecursionError:
        raise ValueError(f"{str(path)!r} is not valid JSON: nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not valid JSON: {error}") from None
    # Strings hold no line break of their own here, so that none of theirs is touched.
    text = re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda match: " ".join(match[0].split()), text)
    return Data(path.name, value, text)


def _fail(error: OSError) -> None:
    raise error
