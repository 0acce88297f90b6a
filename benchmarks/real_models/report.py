"""Writes the pages of pretrained models: ``python -m benchmarks.real_models.report DIR --write-docs``.

DIR is what ``benchmarks.real_models.results`` keeps. The pages are docs/is-it-lossless.md, the choice in
docs/patterns.md and the README's table; only their generated parts are replaced.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.kernels.generated import fill
from benchmarks.real_models import figures, pattern_tables, results, tables
from benchmarks.real_models.written import Found

ROOT = Path(__file__).parents[2]
PAGE, README, FIGURES = ROOT / "docs" / "is-it-lossless.md", ROOT / "README.md", ROOT / "docs" / "figures"
PATTERNS = ROOT / "docs" / "patterns.md"
_SAYS = {
    "tasks": "Difference to stock by task and length, with its 95% interval",
    "needle": "Scores of stock and of TRIMIX by the needle's depth and the length",
    "layers": "Divergence from stock against the number of triangle layers",
    "shape": "Divergence from stock against last_n, n_local and shape",
    "long": "Share of long answers that are still stock's, by token",
}


def parts(found: Found, drawn: dict[str, str]) -> dict[str, str]:
    """The page's generated parts, with the pictures that were drawn.

    Args:
        found: What is kept of the evaluation.
        drawn: Files of pictures by part.
    """
    return {
        part: text + (f"\n\n![{_SAYS[part]}](figures/{drawn[part]})" if part in drawn else "")
        for part, text in tables.parts(found).items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models.report", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="a folder of benchmarks/results")
    parser.add_argument("--write-docs", action="store_true", help="write the pages and pictures (default: print)")
    args = parser.parse_args(argv)
    try:
        found = results.read(args.folder)
        if not args.write_docs:
            print("\n\n".join([*parts(found, {}).values(), tables.summary(found), pattern_tables.choice(found)]))
            return 0
        PAGE.write_text(fill(PAGE.read_text(), parts(found, figures.draw(FIGURES, found))))
        PATTERNS.write_text(fill(PATTERNS.read_text(), {"choice": pattern_tables.choice(found)}))
        README.write_text(fill(README.read_text(), {"real-models": tables.summary(found)}))
    except (OSError, ValueError) as error:
        print(f"real-models: error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
