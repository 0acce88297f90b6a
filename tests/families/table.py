"""The whole matrix."""

from __future__ import annotations

from tests.families import dense, gpt, hybrids, moe, windows
from tests.families.family import Family

FAMILIES: list[Family] = [*dense.FAMILIES, *gpt.FAMILIES, *moe.FAMILIES, *windows.FAMILIES, *hybrids.FAMILIES]
