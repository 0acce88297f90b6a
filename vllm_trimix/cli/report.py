"""``vllm-trimix report``: one HTML page from the results of benchmarks and of the other commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "report",
        help="put the results of benchmarks, calibrate, eval, probe and search into one HTML page",
        description="Writes one HTML page, which needs no other file and no network: of each result its report with "
        "the pictures, where it was measured, and its JSON. The same results give the same page.",
        epilog="example: vllm-trimix report benchmarks/results --output report.html",
    )
    parser.add_argument(
        "results",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="a folder with results, one that holds several such folders, or an overlay (.json) of calibrate",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("trimix-report.html"),
        metavar="FILE.html",
        help="the page; an earlier one is replaced (default: %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the page.

    Raises:
        ValueError: Something the user got wrong.
        OSError: A file that can't be read or written.
    """
    # Needs the extra `report`.
    from vllm_trimix.reporting import page, sources

    page.check_output(args.output)
    sections = [page.section(result) for result in sources.find(args.results)]
    for section in sections:
        for note in section.notes:
            print(f"report: {section.label!r}: {note}", file=sys.stderr)
    text = page.html(sections)
    page.write(text, args.output)
    count = "1 result" if len(sections) == 1 else f"{len(sections)} results"
    print(f"wrote {args.output}: {count}, {len(text) / 1e6:.1f} MB")
    return 0
