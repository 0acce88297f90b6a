"""The composed CUDA backends, driven by model runner V2 on CPU tensors, against the definition row by row.

vLLM's builders, implementations, attention layers, cache layouts and runner are its own, and so is the triangle kernel;
only the dense kernels are replaced, by the reference. See ``cuda_on_cpu``.
"""

from __future__ import annotations

from typing import Any

import pytest

from tests.backend.report import DENSE, crash, wrong_counts, wrong_density, wrong_notes, wrong_rows
from vllm_trimix.backend.dynamic import prefill as dynamic
from vllm_trimix.patterns.estimate import MAX_SCORES

SCENARIOS = (
    "random-LBHNC-gqa1",
    "random-LBNHC-gqa4",
    "random-BLNHC-gqa4",
    "last_rows_straddle_chunks",
    "short_prompts",
    "rows_gathered_or_sliced",
    "cached_prefix",
    "padded_requests",
    "dynamic_chunks",
)


@pytest.fixture(params=[f"{dense}-{name}" for dense in DENSE for name in SCENARIOS])
def result(request: pytest.FixtureRequest, report: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = report["scenarios"][request.param]
    assert not crash(found), crash(found)
    return found


def test_rows_match_their_definition(result: dict[str, Any]) -> None:
    assert wrong_rows(result) == []


def test_every_row_is_counted_in_its_class(result: dict[str, Any]) -> None:
    assert wrong_counts(result) == []


def test_scenario_was_what_it_says(result: dict[str, Any]) -> None:
    assert wrong_notes(result) == []


def test_dynamic_rows_are_among_them(report: dict[str, Any]) -> None:
    """In batches of every kind, by dense backend: rows of patterns, and their keys counted on the way."""
    for dense in DENSE:
        found = [result for name, result in report["scenarios"].items() if name.startswith(f"{dense}-")]
        assert sum(result["rows"].get("dynamic", 0) for result in found) > 500
        assert [problem for result in found for problem in wrong_density(result)] == []
        assert any(result["counted"]["keys_read"] < 0.9 * result["counted"]["keys_causal"] for result in found)


@pytest.mark.parametrize("dense", DENSE)
class TestComposedClasses:
    def test_keeps_the_name_and_declines_what_a_plan_cannot_follow(self, report: dict[str, Any], dense: str) -> None:
        facts = report["facts"][dense]
        assert facts["name"] == "TRIMIX"
        assert facts["supports"] == dict.fromkeys(facts["supports"], False)
        assert facts["update_block_table"] is False

    def test_graphs_hold_decodes_only(self, report: dict[str, Any], dense: str) -> None:
        facts = report["facts"][dense]
        assert facts["stock_graphs"] == "ALWAYS"
        assert facts["graphs"] == "UNIFORM_SINGLE_TOKEN_DECODE"
        assert facts["varlen"] is None
        # vLLM's own resolution, from that support.
        assert facts["resolved_mode"] == "FULL_DECODE_ONLY"

    def test_plans_only_the_step_being_executed(self, report: dict[str, Any], dense: str) -> None:
        facts = report["facts"][dense]
        assert facts["planned"]
        assert [facts["drafted"], facts["captured"], facts["outside"]] == [False, False, False]

    def test_micro_batches_are_dense_and_counted_whole(self, report: dict[str, Any], dense: str) -> None:
        found = report["facts"][dense]["micro_batched"]
        assert found["planned"] == [False, False]
        assert found["counted"] == {"ubatch": found["rows"]}

    def test_binds_layers_by_their_index(self, report: dict[str, Any], dense: str) -> None:
        facts = report["facts"][dense]
        assert facts["active"] == [False, True, False, True]
        # vLLM recognises implementations by their class.
        assert all(facts["stock_impl"])

    def test_dense_remainder_has_a_builder_of_its_own(self, report: dict[str, Any], dense: str) -> None:
        assert report["facts"][dense]["two_builders"]
        assert report["facts"][dense]["remainder_slots"]

    def test_profiles_like_stock(self, report: dict[str, Any], dense: str) -> None:
        assert report["facts"][dense]["profiled_without_patterns"] == {"zero": True, "bytes": 0}

    def test_profiles_what_dynamic_patterns_may_hold(self, report: dict[str, Any], dense: str) -> None:
        """Keys, scores, lists and copies at their limits, and the queries: 3 rows of 2 heads of 32 in fp32."""
        limits = dynamic.MAX_KEY_BYTES + dynamic.MAX_CHOICE_BYTES + dynamic.MAX_INDEX_BYTES + 4 * MAX_SCORES
        assert limits == 640 * 2**20
        assert report["facts"][dense]["profiled"] == {"zero": True, "bytes": limits + 3 * 2 * 32 * 4}


def test_flashinfer_shares_one_workspace() -> None:
    pytest.importorskip("flashinfer", reason="comes with vLLM's CUDA builds only; see benchmarks/gpu/TODO.md")
    from vllm.v1.attention.backends.flashinfer import FlashInferBackend

    from vllm_trimix.backend.attention import _compose
    from vllm_trimix.backend.builder import SharedWorkspace

    assert issubclass(_compose(FlashInferBackend).get_builder_cls(), SharedWorkspace)
