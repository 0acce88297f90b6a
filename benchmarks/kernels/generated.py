"""Generated parts of documents: each lies between two comments that name it."""

from __future__ import annotations

import re
from collections.abc import Mapping


def part(name: str, text: str) -> str:
    """A generated part as it stands in a page."""
    return f"<!-- generated: {name} -->\n\n{text}\n\n<!-- end -->"


def fill(page: str, parts: Mapping[str, str]) -> str:
    """A page with its generated parts made anew.

    Args:
        page: Text with a comment ``<!-- generated: NAME -->`` and a later ``<!-- end -->`` for each part.
        parts: Text of each part by name.

    Raises:
        ValueError: The page's parts are others than those given.
    """
    found = re.findall(r"^<!-- generated: (\S+) -->$", page, re.M)
    if sorted(found) != sorted(parts):
        raise ValueError(
            f"the page has the parts {sorted(found)}; expected {sorted(parts)}: add or remove its comments"
        )
    return re.sub(
        r"^<!-- generated: (\S+) -->$.*?^<!-- end -->$",
        lambda match: part(match[1], parts[match[1]]),
        page,
        flags=re.M | re.S,
    )
