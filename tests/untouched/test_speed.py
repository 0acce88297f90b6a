"""With another backend selected, an engine is as fast with the plugin as without it."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.engine.models import save_tiny_llama
from tests.tiers import Tier
from vllm_trimix.measurement.intervals import interval_confidence, median_interval

ROOT = Path(__file__).parents[2]
CLOCKS = ("wall", "processor")
# Steps as small as an engine's ever are, and many of them: what the plugin could add, it would add to each.
JOB: dict[str, Any] = {
    "rounds": 8,
    "turns": 11,
    "warm_up": 2,
    "max_tokens": 24,
    "prompts": [[7 + (13 * index + number) % 240 for index in range(260)] for number in range(4)],
}
# A busy machine stretches the wall's clock, by whole factors at times, but hardly what a job uses of the processor.
MAX_WIDTH = 0.2


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.tier("J")
def test_an_engine_is_as_fast(tmp_path: Path, tier: Tier, record_property: Any) -> None:
    """The interval of the paired ratio holds 1. It is sound on a busy machine, only wider there.

    A round starts both engines anew and lets them take turns, so that what else the machine does meets both alike; its
    ratio is the median over the turns. Rounds are independent of one another: the interval is over them.
    """
    model = save_tiny_llama(tmp_path / "model", num_heads=4, num_kv_heads=2)
    engine = {
        "model": str(model),
        "attention_backend": "CPU_ATTN",
        "max_model_len": 512,
        "max_num_batched_tokens": 64,
        "dtype": "float32",
    }
    child = subprocess.run(
        [sys.executable, "-m", "tests.untouched.timed"],
        input=json.dumps({**JOB, "engine": engine}),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=3500,
        check=False,
    )
    assert child.returncode == 0, child.stderr[-4000:]
    rounds = [json.loads(line) for line in child.stdout.splitlines()]
    assert len(rounds) == JOB["rounds"]
    for number, found in enumerate(rounds):
        assert found["ours"][""] == []
        assert "vllm_trimix.backend.registration" in found["ours"]["trimix"]
        tier.case("round", number)
    said, intervals = {}, {}
    for clock, name in enumerate(CLOCKS):
        ratios = [statistics.median(ours[clock] / stock[clock] for stock, ours in found["turns"]) for found in rounds]
        low, high = intervals[name] = median_interval(ratios)
        confidence = interval_confidence(len(ratios))
        said[name] = f"{name}: {statistics.median(ratios):.4f} ({low:.4f}-{high:.4f}, {confidence:.1%})"
        record_property(name, said[name])
        print(said[name], [round(ratio, 4) for ratio in ratios])
    for name, (low, high) in intervals.items():
        assert low <= 1 <= high, f"{said[name]} does not hold 1"
    low, high = intervals["processor"]
    assert high - low < MAX_WIDTH, f"{said['processor']} is too wide to mean anything: give it a machine to itself"
