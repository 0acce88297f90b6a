"""Keys and values that TRIMIX computed, handed to another engine through a folder by vLLM's example connector.

The connector keeps what a prompt's first step computed, under the hash of its tokens alone: prompts must fit in one
step, and a ``cache_salt`` tells nothing apart. It copies whole pages in the order in which they lie, so that the packed
pages of the CPU arrive as they were.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.cpu import fast_dtype
from tests.engine.configurations import triangle
from tests.engine.ledger import assert_balanced
from tests.engine.models import save_tiny_llama
from tests.engine.run import PATTERN, Result, errors, prompts, run_job
from tests.probing.models import question
from tests.tiers import Tier
from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec

pytestmark = pytest.mark.tier("F")

PAGE = 32
SPEC = CircuitSpec()
STOCK = {"attention_backend": "CPU_ATTN", "additional_config": {}}
LENGTHS = [(1500, 1), (2000, 2), (2031, 2)]


def loaded(prompt_len: int) -> int:
    """Tokens that the connector finds for a prompt it has kept: whole pages, without the last token."""
    return (prompt_len - 2) // PAGE * PAGE


def run(
    tmp_path: Path, model: Path, wave: list[dict[str, Any]], store: Path, role: str, engine: dict[str, Any], **job: Any
) -> Result:
    """One engine with the folder as its external cache."""
    transfer = {
        "kv_connector": "ExampleConnector",
        "kv_role": role,
        "kv_connector_extra_config": {"shared_storage_path": str(store)},
    }
    # One prompt a step: budgets are shared, and the connector keeps a first chunk under the whole prompt's name.
    engine = {"max_num_batched_tokens": 2200, "max_model_len": 2200, "kv_transfer_config": transfer, **engine}
    return run_job(tmp_path, model, [[request] for request in wave], engine=engine, **job)


@pytest.fixture(scope="module")
def circuit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Any]]:
    """The demo model, and questions that it answers."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("circuit") / "model"
    make_demo_model(folder, SPEC)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return folder, [question(tokenizer, tokens=tokens, hops=hops, seed=tokens) for tokens, hops in LENGTHS]


def handed_over(
    tmp_path: Path, circuit: tuple[Path, list[Any]], layers: str, bad_extra_args: list[dict[str, Any]]
) -> tuple[Result, Result, list[bool]]:
    """Prefill by TRIMIX, then the same questions to a stock engine; and whether that answers right."""
    model, samples = circuit
    wave = [{"prompt": list(sample.prompt), "max_tokens": len(sample.answer)} for sample in samples]
    producer = {"additional_config": {"trimix": {"layers": layers, "min_prompt_len": 0}}, "dtype": fast_dtype()}
    store = tmp_path / "store"
    first = run(tmp_path, model, wave, store, "kv_producer", producer, bad_extra_args=bad_extra_args)
    second = run(tmp_path, model, wave, store, "kv_consumer", {**STOCK, "dtype": fast_dtype()})
    assert [said["cached_tokens"] for (said,) in second.waves] == [loaded(len(request["prompt"])) for request in wave]
    assert second.rows == {}
    right = [said["tokens"] == list(sample.answer) for sample, (said,) in zip(samples, second.waves, strict=True)]
    return first, second, right


def test_prefill_by_trimix_decode_by_stock(circuit: tuple[Path, list[Any]], tmp_path: Path, tier: Tier) -> None:
    off = {"trimix": "off"}
    first, _, right = handed_over(tmp_path, circuit, "4-7", [off])
    assert right == [True] * len(LENGTHS)
    assert [said["tokens"] for (said,) in first.waves] == [list(sample.answer) for sample in circuit[1]]
    assert first.rows["triangle"] == sum(len(sample.prompt) - 128 for sample in circuit[1])
    # The store would hand an opted-out request what a triangle prefill left under the same tokens.
    assert "must prefill densely (opt_out), but KV connector ExampleConnector" in first.refusals[0]
    assert " BUT " not in first.refusals[0]
    tier.case("connector", "stock decodes", triangle=True, cached=True)


@pytest.mark.slow
def test_the_answer_comes_from_the_handed_over_keys(
    circuit: tuple[Path, list[Any]], tmp_path: Path, tier: Tier
) -> None:
    """The layer that looks up the record is sparse on the first engine, and the second, dense, can't know it either."""
    first, _, right = handed_over(tmp_path, circuit, "3-7", [])
    assert right == [hops == 1 for _, hops in LENGTHS]
    assert first.rows["triangle"] > 0
    tier.case("connector", "crippled", triangle=True, cached=True)


@pytest.mark.slow
def test_logprobs(tmp_path: Path, tier: Tier) -> None:
    """What is left to compute follows the mask: on a stock engine where only last rows are left, on TRIMIX anywhere."""
    model = save_tiny_llama(tmp_path / "4-2", num_heads=4, num_kv_heads=2)
    last_left = [PAGE * pages + rest for pages, rest in ((4, 2), (9, 5), (20, PATTERN.last_n))]
    more_left = [PAGE * 7 + 20, PAGE * 11 + 31]
    kept = triangle(prompts(last_left + more_left))
    store = tmp_path / "store"
    run(tmp_path, model, kept, store, "kv_producer", {})

    answered = kept[: len(last_left)]
    cold = [{**request, "extra_args": {"trimix": "off"}} for request in triangle(prompts(last_left, seed=1))]
    result = run(tmp_path, model, answered + cold, store, "kv_consumer", STOCK)
    answers = [said for (said,) in result.waves]
    assert [said["cached_tokens"] for said in answers] == [*map(loaded, last_left), *[0] * len(cold)]
    stock = errors(model, answered + cold, answers)
    stock.assert_within(stock.stock)
    tier.case("connector", "log-probabilities", "stock", triangle=False, cached=True)

    result = run(tmp_path, model, kept, store, "kv_consumer", {})
    answers = [said for (said,) in result.waves]
    assert [said["cached_tokens"] for said in answers] == [loaded(len(request["prompt"])) for request in kept]
    errors(model, kept, answers).assert_within(stock.stock)
    for request, said, ledger in zip(kept, result.waves, result.ledgers, strict=True):
        assert_balanced([request], said, ledger, PATTERN)
    assert result.rows["triangle"] == 20 + 31 - 2 * PATTERN.last_n
    tier.case("connector", "log-probabilities", "trimix", triangle=True, cached=True)
