"""Whatever a request carries in ``vllm_xargs``: one of three choices reaches the engine, or it is refused."""

from __future__ import annotations

from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from vllm import SamplingParams
from vllm.exceptions import VLLMValidationError

from tests.backend.test_admission import Processor, admit
from tests.hostile.values import VALUES, nested
from tests.tiers import Tier
from vllm_trimix.backend import admission, names, requests
from vllm_trimix.config.resolve import resolve

KEYS = st.sampled_from(
    ("trimix", "trimix", "trimix", "trimix_dense", "trimix_", "Trimix", "TRIMIX", "trimixed", " trimix", "tri", "other")
)
CHOICES = st.sampled_from(("on", "triangle", "off", "on", "off"))
XARGS = st.dictionaries(KEYS | st.text(max_size=4), CHOICES | VALUES, max_size=2) | st.none()


class Runner:
    """What a worker's table of requests asks of its runner."""

    vllm_config = SimpleNamespace(model_config=SimpleNamespace())


@pytest.fixture(scope="module")
def step() -> Any:
    """What a worker knows of its requests."""
    return requests.Step(Runner(), resolve({"layers": "1"}, model="m", num_layers=2))


def outcome(step: Any, extra_args: Any) -> str:
    """Sends arguments from the construction of the parameters to the worker's table of requests."""
    processor = Processor()
    said = []
    for late in (False, True):
        admission._engines.add(processor)
        try:
            params = SamplingParams(extra_args=None if late else extra_args)
            params.extra_args = extra_args
            request = admit(processor, params)
            said.append("accepted")
        except VLLMValidationError as error:
            said.append(str(error))
        finally:
            admission._engines.discard(processor)
    ours = [key for key in extra_args or {} if str(key).lower().startswith("trimix")]
    valid = all(key == "trimix" and extra_args[key] in names.ALLOWED for key in ours)
    if said[0].startswith("extra_args"):
        # vLLM's own limits, which it checks at construction, before ours, and some of them at admission again.
        assert said[1] == said[0] or (said[1] == "accepted") == valid
        return "refused"
    assert said[0] == said[1], "construction and admission disagree"
    if not valid:
        assert said[0] != "accepted", f"{extra_args!r} reached the engine"
        assert "vllm_xargs" in said[0]
        assert len(said[0]) < 1000
        return "refused"
    assert said[0] == "accepted"
    sent = request.sampling_params
    new = SimpleNamespace(prompt_len=10, pooling_params=None, sampling_params=sent, mm_features=[])
    choice = (extra_args or {}).get("trimix", "on")
    found = step._request(new, None)
    assert found.dense_reason == ("opt_out" if choice == "off" else None)
    assert found.dynamic_reason == ("opt_out_dynamic" if choice == "triangle" else None)
    return "accepted"


@pytest.mark.tier("I")
def test_any_xargs(step: Any, tier: Tier) -> None:
    met: Counter[str] = Counter()

    @settings(
        max_examples=tier.size(sample=300, full=20_000),
        deadline=None,
        suppress_health_check=list(HealthCheck),
        database=None,
        derandomize=bool(tier.size(sample=1, full=0)),
    )
    @given(extra_args=XARGS)
    def run(extra_args: Any) -> None:
        met[outcome(step, extra_args)] += 1
        tier.case("xargs", met.total())

    run()
    assert all(met[kind] > met.total() // 20 for kind in ("accepted", "refused")), met


LARGE: dict[str, Any] = {
    "ten million characters": {"trimix": "off" * 3_000_000},
    "a key of ten million characters": {"trimix" * 1_500_000: "off"},
    "a million items": {"trimix": ["off"] * 10**6},
    "deep": {"trimix": nested(20_000)},
    "five thousand digits": {"trimix": 10**5000},
    "no object": ["trimix"],
    "a word": "trimix",
}


@pytest.mark.tier("I")
@pytest.mark.parametrize("name", LARGE)
def test_large_and_misshapen_xargs_are_refused_in_short_words(name: str, tier: Tier) -> None:
    processor = Processor()
    params = SamplingParams()
    params.extra_args = LARGE[name]
    with pytest.raises(VLLMValidationError, match="vllm_xargs") as refused:
        admit(processor, params)
    assert len(str(refused.value)) < 1000
    tier.case("large xargs", name)
