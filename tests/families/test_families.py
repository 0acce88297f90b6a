"""Every family of models by a real engine: served with the mask where it can be, refused in a line, or not stock's."""

from __future__ import annotations

from pathlib import Path

import pytest
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from tests.families.family import Family
from tests.families.run import ENVIRONMENT, check, engine_job, named_stock, phase, save
from tests.families.store import keep
from tests.families.table import FAMILIES
from tests.tiers import Tier
from vllm_trimix.backend.attention import compose

pytestmark = [pytest.mark.tier("K"), pytest.mark.timeout(1200)]


@pytest.mark.parametrize(
    "family",
    [pytest.param(each, id=each.slug, marks=() if each.feature else pytest.mark.slow) for each in FAMILIES],
)
def test_family(family: Family, tmp_path: Path, tier: Tier) -> None:
    report = check(family, tmp_path)
    keep(family, report)
    # What an entry expects to fail says nothing of rows.
    facts = {"triangle": bool(report.sparse)} if family.outcome == "served" else {}
    tier.case(family.name, **facts)


# Their modules compute while they are built.
COMPUTING = ("BLOOM", "Apertus")


@pytest.mark.parametrize("which", ["some", pytest.param("all", marks=pytest.mark.slow)])
def test_doctor_foretells_the_start_line(which: str, tmp_path: Path, tier: Tier) -> None:
    families = [
        family
        for family in FAMILIES
        if family.outcome != "stock_fails" and (which == "all" or family.feature or family.name in COMPUTING)
    ]
    jobs = []
    for family in families:
        arguments = engine_job(family, save(family, tmp_path / family.slug), trimix=True, drawn=True)["engine"]
        flags = [f"--{key.replace('_', '-')}={arguments[key]}" for key in ("dtype", "max_model_len", "block_size")]
        flags += ["--skip-tokenizer-init", "--enforce-eager", *["--trust-remote-code"] * family.own_code]
        flags += [f"--{key.replace('_', '-')}={value}" for key, value in family.engine.items() if "format" in key]
        jobs.append((arguments["model"], flags))
    seen = phase("preview", {"models": jobs, "env": ENVIRONMENT}, tmp_path)
    assert not seen.error, seen.log[-6000:]
    for family, said in zip(families, seen.result, strict=True):
        if family.outcome == "refused":
            assert family.words in said["refused"], family.name
            continue
        assert not said["refused"], f"{family.name}: {said['refused']}"
        assert said["unsure"] is None, f"{family.name}: {said['unsure']}"
        assert named_stock(said["line"]) == family.stock, f"{family.name}: {said['line']}"
        tier.case("doctor", family.name)


def test_mla_is_refused_by_the_backend_too() -> None:
    """Of some models vLLM knows that they are MLA only while it builds them."""
    with pytest.raises(ValueError, match="does not support MLA models"):
        compose(AttentionBackendEnum.CPU_MLA.value)
