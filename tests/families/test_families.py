"""Every family of models by a real engine: served with the mask where it can be, refused in a line, or not stock's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.families.family import Family
from tests.families.run import check
from tests.families.table import FAMILIES
from tests.tiers import Tier

pytestmark = [pytest.mark.tier("K"), pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, id=each.slug, marks=() if each.feature else pytest.mark.slow) for each in FAMILIES],
)
def test_family(family: Family, tmp_path: Path, tier: Tier) -> None:
    report = check(family, tmp_path)
    # What an entry expects to fail says nothing of rows.
    facts = {"triangle": bool(report.sparse)} if family.outcome == "served" else {}
    tier.case(family.name, **facts)
