"""Every engine configuration gives right answers and counts every row once: a covering design over seven choices."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.engine.configurations import ENGINES, LOADS, SAMPLE, Engine, Load, asked
from tests.engine.ledger import assert_balanced
from tests.engine.models import save_tiny_llama
from tests.engine.run import PATTERN, Errors, Result, errors, run_job
from tests.tiers import Tier

pytestmark = [pytest.mark.tier("F"), pytest.mark.timeout(1800)]


class Run(NamedTuple):
    """One engine's run over all loads, and how far each wave's answers are from the truth."""

    engine: Engine
    result: Result
    errors: dict[Load, Errors]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """For engines without and with speculation: of the latter's drafts some are right."""
    root = tmp_path_factory.mktemp("tiny")
    return {
        ngram: save_tiny_llama(root / name, num_heads=4, num_kv_heads=2, embedding_scale=scale)
        for ngram, name, scale in ((False, "random", 1.0), (True, "circling", 1000.0))
    }


@pytest.fixture(
    scope="module",
    params=[engine if engine in SAMPLE else pytest.param(engine, marks=pytest.mark.slow) for engine in ENGINES],
    ids=str,
)
def run(request: pytest.FixtureRequest, models: dict[bool, Path], tmp_path_factory: pytest.TempPathFactory) -> Run:
    engine: Engine = request.param
    model, waves = models[engine.ngram], [asked(load) for load in LOADS]
    result = run_job(
        tmp_path_factory.mktemp("engine"),
        model,
        waves,
        engine=engine.arguments(),
        env=engine.environment(),
        timeout=1500,
    )
    found = zip(LOADS, waves, result.waves, strict=True)
    return Run(engine, result, {load: errors(model, wave, answers) for load, wave, answers in found})


@pytest.mark.parametrize("load", LOADS, ids=str)
def test_answers_and_rows(run: Run, load: Load, tier: Tier) -> None:
    engine, result, found = run
    wave, answers, ledger = asked(load), result.waves[LOADS.index(load)], result.ledgers[LOADS.index(load)]
    # Waves without opted-out requests are held to the budget that the others of this engine set.
    found[load].assert_within(max(error.stock for error in found.values()))
    assert_balanced(wave, answers, ledger, PATTERN)

    facts = ledger.facts(wave, PATTERN)
    assert facts["triangle"]
    assert facts["resumed"] == load.preempted == (ledger.metric("num_preemptions") > 0)
    drafts, accepted = ledger.metric("spec_decode_num_draft_tokens"), ledger.metric("spec_decode_num_accepted_tokens")
    assert (drafts > 0) == engine.ngram
    if engine.ngram and load.preempted:
        assert 0 < accepted < drafts, f"{accepted} of {drafts} drafts were accepted"
    if engine.chunk is None:
        assert not facts.pop("straddling")
    if not engine.prefix_cache:
        assert not facts.pop("cached")
    if load == Load(preempted=False, opt_out=False):
        hits = [answer["cached_tokens"] for answer in answers[:4]]
        assert hits == ([1984, 768, 672, 512] if engine.prefix_cache else [0] * 4)
    tier.case("engine", *engine, *load, **facts)


def test_every_three_values_meet() -> None:
    """So does every pair; the waves of an engine are all the values of the last two choices."""
    cases = {(*engine, *load) for engine in ENGINES for load in LOADS}
    assert len(cases) == len(ENGINES) * len(LOADS) >= 48
    choices: list[list[Any]] = [[512, 2048, None], [False, True], [False, True], [1, 2], *[[False, True]] * 3]
    for columns in itertools.combinations(range(len(choices)), 3):
        met = {tuple(case[column] for column in columns) for case in cases}
        assert met == set(itertools.product(*(choices[column] for column in columns)))
