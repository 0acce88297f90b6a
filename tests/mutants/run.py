"""Tries all mutants, or some: ``python -m tests.mutants.run [--only TEXT] [--write-docs]``.

Works in a copy of the checkout. What is known of the same sources is not tried again: stopped, it goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.mutants import generated, hand
from tests.mutants.bench import Bench, Mutant, Outcome
from tests.mutants.report import DOCS, render


def every_mutant() -> list[Mutant | generated.Generated]:
    """By hand, then the tool's."""
    return [*hand.MUTANTS, *(mutant for path in generated.TESTS for mutant in generated.mutants(path))]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.mutants.run", description=__doc__)
    parser.add_argument("--only", default="", metavar="TEXT", help="mutants whose name or file has this in it")
    parser.add_argument("--write-docs", action="store_true", help=f"write {DOCS.name} from the outcomes of all")
    arguments = parser.parse_args()
    outcomes: dict[str, Outcome] = {}
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder))
        for mutant in every_mutant():
            if arguments.only not in mutant.name and arguments.only not in mutant.path:
                continue
            outcome = outcomes[mutant.name] = bench.try_out(mutant.path, mutant.text, mutant.tests)
            print(f"{outcome.seconds:6.1f} s  {mutant.name}: {outcome.killed_by or 'SURVIVED'}", flush=True)
        bench.close()
    survivors = [name for name, outcome in outcomes.items() if not outcome.killed_by]
    unexplained = [name for name in survivors if name not in generated.EQUIVALENT]
    print(
        f"{len(outcomes)} mutants in {time.monotonic() - start:.0f} s, {len(survivors)} survived, "
        f"{len(unexplained)} of them unexplained"
    )
    if arguments.write_docs:
        DOCS.write_text(render(outcomes))
    return bool(unexplained)


if __name__ == "__main__":
    sys.exit(main())
