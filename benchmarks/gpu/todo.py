"""Strikes what results have settled from ``TODO.md``.

    python -m benchmarks.gpu.todo benchmarks/results/NAME/results.json

An item is settled when every stage of one of its scripts has passed on a GPU.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.gpu.programs import PROGRAMS
from benchmarks.gpu.report import load, write_atomically
from benchmarks.gpu.running.source import ROOT

TODO = ROOT / "benchmarks" / "gpu" / "TODO.md"
_ROW = re.compile(r"^\| (\d+) \| (~~)?\[([\w.-]+)\]\(#[\w-]+\)(?:~~)? \| (.*?) \| (\d+) \| ([\d.]+) \| (.*?) \|$", re.M)


@dataclass(frozen=True)
class Item:
    """A row of the list.

    Attributes:
        rank: From 1.
        name: Names its section.
        struck: Whether it is settled.
        worth: To a user, 1 to 10.
        minutes: Of a device.
        by: What settles it: stages of each script by its name, or words.
    """

    rank: int
    name: str
    struck: bool
    worth: int
    minutes: float
    by: str

    @property
    def stages(self) -> dict[str, list[str]]:
        """Patterns of stage names by script: ``all``, ``first``, ``second``."""
        parts = re.findall(r"\b(all|first|second): ([\w*, ]+)", self.by)
        return {script: [name.strip() for name in names.split(",")] for script, names in parts}


def items(text: str) -> list[Item]:
    """The rows of the list, in order."""
    return [
        Item(int(rank), name, bool(struck), int(worth), float(minutes), by)
        for rank, struck, name, _, worth, minutes, by in _ROW.findall(text)
    ]


def settled(item: Item, results: Mapping[str, Mapping[str, Any]], known: Mapping[str, Iterable[str]]) -> bool:
    """Whether all stages of one of an item's scripts have passed on a GPU, whichever script ran them.

    Args:
        item: The item.
        results: Stages' results by name.
        known: All stages' names by script.
    """
    passed = {
        name
        for name, result in results.items()
        if result.get("status") == "passed"
        and result.get("settings", {}).get("device") == "cuda"
        and not result["settings"].get("toy")
    }
    for script, patterns in item.stages.items():
        due = {name for pattern in patterns for name in fnmatch.filter(known[script], pattern)}
        if due and due <= passed:
            return True
    return False


def strike(text: str, results: Mapping[str, Mapping[str, Any]], known: Mapping[str, Iterable[str]], link: str) -> str:
    """The list with the items struck that the results settle, each with a link to them."""

    def row(match: re.Match[str]) -> str:
        (item,) = items(match[0])
        if item.struck or not settled(item, results, known):
            return match[0]
        name = f"[{item.name}]("
        struck = re.sub(rf"({re.escape(name)}#[\w-]+\))", r"~~\1~~", match[0])
        return struck.removesuffix(" |") + f"; settled: [results]({link}) |"

    return _ROW.sub(row, text)


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrites the list; 0, or 2 with one line on stderr when a file is no results file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.todo", description="Strike what results settle.")
    parser.add_argument("results", nargs="+", type=Path, metavar="RESULTS.json", help="of a bundle")
    args = parser.parse_args(argv)
    known = {name: [stage.name for stage in program.stages] for name, program in PROGRAMS.items()}
    text = TODO.read_text()
    for file in args.results:
        bundle = load(file)
        if bundle is None or not isinstance(bundle.get("stages"), dict):
            print(f"todo: error: {file} is not a bundle's results.json; name one that --bundle wrote", file=sys.stderr)
            return 2
        link = os.path.relpath(file.resolve(), TODO.parent)
        text = strike(text, bundle["stages"], known, link)
    write_atomically(TODO, text)
    open_items = [item.name for item in items(text) if not item.struck]
    print(f"{len(open_items)} items are open: {', '.join(open_items)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
