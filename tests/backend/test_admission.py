"""Admission decisions that no small server can show: connectors, salts, stamps."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm import PoolingParams, SamplingParams
from vllm.config import KVTransferConfig, VllmConfig
from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory
from vllm.exceptions import VLLMValidationError

from vllm_trimix.backend import admission, names, namespaces
from vllm_trimix.config.resolve import resolve


class Processor:
    """The parts of vLLM's InputProcessor that admission touches."""

    def __init__(
        self, connector: str | None = None, prompt_logprobs: str = "dense", shallow: dict[str, Any] | str = "dense"
    ) -> None:
        entry = {"layers": "1", "prompt_logprobs": prompt_logprobs, "shallow": shallow}
        resolved = resolve(entry, model="m", num_layers=2)
        transfer = SimpleNamespace(kv_connector=connector) if connector else None
        self.vllm_config = SimpleNamespace(
            additional_config={names.RESOLVED: resolved.model_dump(mode="json")}, kv_transfer_config=transfer
        )


def admit(processor: Processor, params: Any, *, salt: str | None = None, resumable: bool = False) -> Any:
    def process_inputs(self: Processor, request_id: str, prompt: str, params: Any, *, resumable: bool = False) -> Any:
        sampling = params.clone() if isinstance(params, SamplingParams) else None
        return SimpleNamespace(sampling_params=sampling, cache_salt=salt)

    admission._engines.add(processor)
    try:
        return admission._admitted(process_inputs)(processor, "id", "prompt", params, resumable=resumable)
    finally:
        admission._engines.discard(processor)


@pytest.mark.parametrize(
    ("params", "resumable", "reason"),
    [
        (SamplingParams(), False, None),
        (SamplingParams(extra_args={"trimix": "on"}), False, None),
        (SamplingParams(extra_args={"trimix": "off"}), False, "opt_out"),
        (SamplingParams(prompt_logprobs=1), False, "prompt_logprobs"),
        (SamplingParams(), True, "streaming_input"),
    ],
)
def test_stamp_and_salt(params: SamplingParams, resumable: bool, reason: str | None) -> None:
    before = dict(params.extra_args or {})
    request = admit(Processor(), params, salt="tenant", resumable=resumable)
    assert (request.sampling_params.extra_args or {}).get(names.DENSE_KEY) == reason
    assert request.cache_salt == ("tenant" if reason is None else "trimix-dense:tenant")
    assert dict(params.extra_args or {}) == before, "the caller's own parameters were changed"


def test_pooling_is_dense() -> None:
    assert admit(Processor(), PoolingParams()).cache_salt == "trimix-dense"


def test_the_research_switch_measures_the_mask() -> None:
    request = admit(Processor(prompt_logprobs="triangle"), SamplingParams(prompt_logprobs=1))
    assert request.cache_salt is None


def test_dynamic_patterns_have_namespaces_of_their_own() -> None:
    """One for each configuration, one for the triangle alone, and the dense one as ever."""
    salts = {}
    for gamma in (0.9, 0.95):
        shallow = {"pattern": "flexprefill", "gamma": gamma}
        for choice in ("on", "triangle", "off"):
            params = SamplingParams(extra_args={"trimix": choice})
            salts[gamma, choice] = admit(Processor(shallow=shallow), params, salt="tenant").cache_salt
    assert salts[0.9, "on"] != salts[0.95, "on"]
    assert salts[0.9, "on"].startswith("trimix-dynamic-")
    assert {salt for key, salt in salts.items() if key[1] == "triangle"} == {"trimix-triangle:tenant"}
    assert {salt for key, salt in salts.items() if key[1] == "off"} == {"trimix-dense:tenant"}
    assert all(salt.endswith(":tenant") for salt in salts.values())
    assert admit(Processor(), SamplingParams(extra_args={"trimix": "triangle"})).cache_salt is None


@pytest.mark.parametrize("salt", ["trimix-dense", "trimix-dense:x", "trimix-dynamic-1", "trimix-triangle"])
def test_a_salt_cannot_reach_the_reserved_namespaces(salt: str) -> None:
    with pytest.raises(VLLMValidationError, match="which TRIMIX keeps for requests of its own choice"):
        admit(Processor(), SamplingParams(), salt=salt)


def test_connectors_that_ignore_salts_get_no_dense_requests() -> None:
    off = SamplingParams(extra_args={"trimix": "off"})
    with pytest.raises(VLLMValidationError, match=r"opt_out.*ExampleConnector.*not known to honour cache_salt"):
        admit(Processor("ExampleConnector"), off)
    assert admit(Processor("ExampleConnector"), SamplingParams()).cache_salt is None
    for name in namespaces.SALT_AWARE_CONNECTORS:
        assert name in KVConnectorFactory._registry, name
        assert admit(Processor(name), off).cache_salt == "trimix-dense"


def engine(transfer: dict[str, Any] | None, size: float | None = None, backend: str = "native") -> Any:
    """The parts of an engine's configuration that a connector is judged by."""
    return SimpleNamespace(
        kv_transfer_config=None if transfer is None else KVTransferConfig(**transfer, kv_role="kv_both"),
        cache_config=SimpleNamespace(kv_offloading_size=size, kv_offloading_backend=backend),
    )


def multi(*members: Any) -> dict[str, Any]:
    return {"kv_connector": "MultiConnector", "kv_connector_extra_config": {"connectors": list(members)}}


NIXL = {"kv_connector": "NixlConnector", "kv_role": "kv_both"}
OFFLOADING = {"kv_connector": "OffloadingConnector", "kv_connector_extra_config": {"cpu_bytes_to_use": 1}}
EXAMPLE = {"kv_connector": "ExampleConnector"}
JUDGED: dict[str, tuple[dict[str, Any] | None, str | None]] = {
    "none": (None, None),
    "good members": (multi(NIXL, OFFLOADING), None),
    "one is not": (multi(NIXL, EXAMPLE), "MultiConnector with ExampleConnector"),
    "members of members": (multi(NIXL, multi(OFFLOADING, NIXL)), None),
    "one of those is not": (multi(NIXL, multi(OFFLOADING, EXAMPLE)), "MultiConnector with ExampleConnector"),
    "no members": (multi(), "MultiConnector"),
    "no list": ({"kv_connector": "MultiConnector"}, "MultiConnector"),
    "a member without a name": (multi({}), "MultiConnector with None"),
    "no object": (multi("NixlConnector"), "MultiConnector with 'NixlConnector'"),
    "somebody's own class": ({**NIXL, "kv_connector_module_path": "mine"}, "NixlConnector of mine"),
}


@pytest.mark.parametrize(("transfer", "unsalted"), JUDGED.values(), ids=JUDGED)
def test_connectors_are_judged_by_their_members(transfer: dict[str, Any] | None, unsalted: str | None) -> None:
    transfer = {key: value for key, value in (transfer or {}).items() if key != "kv_role"} or None
    assert namespaces.unsalted_connector(engine(transfer)) == unsalted


@pytest.mark.parametrize("simple", ["0", "1"])
@pytest.mark.parametrize("backend", ["native", "lmcache"])
@pytest.mark.parametrize("transfer", [None, EXAMPLE])
def test_offloading_is_judged_as_what_vllm_makes_of_it(
    monkeypatch: pytest.MonkeyPatch, simple: str, backend: str, transfer: dict[str, Any] | None
) -> None:
    """Before vLLM has put the connector into the configuration, and after."""
    monkeypatch.setenv("VLLM_USE_SIMPLE_KV_OFFLOAD", simple)
    config = engine(transfer, 1.0, backend)
    named = namespaces._offloading_connector(config.cache_config)
    assert namespaces.unsalted_connector(config) is None
    VllmConfig._post_init_kv_transfer_config(config)
    assert config.kv_transfer_config.kv_connector == named
    assert namespaces.unsalted_connector(config) is None
    monkeypatch.setattr(namespaces, "SALT_AWARE_CONNECTORS", ())
    assert namespaces.unsalted_connector(config) == named


def test_other_engines_are_untouched() -> None:
    calls = []
    wrapped = admission._admitted(lambda self, *args, **kwargs: calls.append((args, kwargs)))
    wrapped(Processor(), "id", "prompt", SamplingParams(extra_args={"trimix": "nonsense"}))
    assert len(calls) == 1
