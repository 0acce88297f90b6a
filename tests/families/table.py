"""The whole matrix; ``python -m tests.families.table --write-docs`` writes its page."""

from __future__ import annotations

import argparse
import sys

from tests.families import (
    by_transformers,
    by_transformers_more,
    dense,
    elsewhere,
    gpt,
    hybrids,
    mla,
    moe,
    others,
    own_code,
    own_code_moe,
    own_code_more,
    state_spaces,
    store,
    windows,
    windows_more,
)
from tests.families.family import Family

FAMILIES: list[Family] = [
    *dense.FAMILIES,
    *gpt.FAMILIES,
    *moe.FAMILIES,
    *windows.FAMILIES,
    *windows_more.FAMILIES,
    *hybrids.FAMILIES,
    *state_spaces.FAMILIES,
    *by_transformers.FAMILIES,
    *by_transformers_more.FAMILIES,
    *own_code.FAMILIES,
    *own_code_more.FAMILIES,
    *own_code_moe.FAMILIES,
    *mla.FAMILIES,
    *others.FAMILIES,
    *elsewhere.FAMILIES,
]


def main() -> None:
    """Writes the page from what runs have seen."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write-docs", action="store_true", required=True, help="write docs/models.md")
    parser.parse_args()
    try:
        store.write_docs(FAMILIES)
    except ValueError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
