"""Dynamic patterns on the circuit model: what the choice sees stays right, what it can't see is lost."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest

from tests.cpu import fast_dtype
from tests.engine.run import run_job
from tests.probing.models import question
from vllm_trimix.demo.circuit import make_demo_model
from vllm_trimix.demo.circuit_spec import CircuitSpec

LENGTH, CHUNK = 4096, 1024
# The lookup layer is 3, the answer layer 6; two layers of idle heads look at something of their own.
SPEC = CircuitSpec(distractor_heads=2)
VERTICAL_SLASH = {"pattern": "vertical_slash", "vertical_size": 100, "slash_size": 200}
# All but one of the last 128 rows attend to the first token alone: a smaller share leaves the record out.
FLEXPREFILL = {"pattern": "flexprefill", "gamma": 0.999, "tau": 0.0}
CRIPPLED = {"vertical_slash": {"vertical_size": 30, "slash_size": 50}, "flexprefill": {"gamma": 0.5}}


@pytest.fixture(scope="module")
def circuit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("circuit") / "model"
    make_demo_model(folder, SPEC)
    return folder, AutoTokenizer.from_pretrained(folder)


def hop(words: list[str]) -> tuple[int, int]:
    """Positions of the record's code and of the alias's second name, of a two-hop prompt."""
    key = words[-2]
    (alias,) = (i + 2 for i in range(len(words) - 6) if words[i] == key and words[i + 1] == "matches")
    (record,) = (i + 2 for i in range(alias) if words[i] == words[alias] and words[i + 1] == "is")
    return record, alias


def in_view(prompt: list[int], tokenizer: Any) -> bool:
    """Whether the rows that ask for the record are the last of a chunk, and the record is in an earlier one."""
    words = tokenizer.convert_ids_to_tokens(prompt)
    if "matches" not in words or words[-2] not in [words[i - 1] for i, word in enumerate(words) if word == "matches"]:
        return True
    record, alias = hop(words)
    return record // CHUNK < alias // CHUNK and alias % CHUNK >= CHUNK - 48


def asked(tokenizer: Any, hops: int, count: int) -> list[Any]:
    """Questions whose record lies in an earlier chunk than the rows that look for it.

    Those rows are the alias's, at the end of a chunk, or with one hop the question's own.
    """
    samples = (question(tokenizer, tokens=LENGTH, hops=hops, seed=seed) for seed in itertools.count())
    return list(itertools.islice((sample for sample in samples if in_view(list(sample.prompt), tokenizer)), count))


def right_answers(tmp_path: Path, model: Path, trimix: dict[str, Any], samples: list[Any]) -> list[bool]:
    engine = {
        "max_model_len": LENGTH + 64,
        "max_num_batched_tokens": CHUNK,
        "dtype": fast_dtype(),
        "additional_config": {"trimix": {"stats_log_interval": 0.2, **trimix}},
    }
    requests = [{"prompt": list(sample.prompt), "max_tokens": len(sample.answer)} for sample in samples]
    result = run_job(tmp_path, model, [[request] for request in requests], engine=engine)
    assert result.rows["dynamic_dynamic"] > 0
    return [said["tokens"] == list(sample.answer) for sample, (said,) in zip(samples, result.waves, strict=True)]


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(VERTICAL_SLASH, id="vertical_slash"),
        pytest.param(FLEXPREFILL, id="flexprefill", marks=pytest.mark.slow),
    ],
)
def test_shallow_layers_with_the_lookup_among_them(
    pattern: dict[str, Any], circuit: tuple[Path, Any], tmp_path: Path
) -> None:
    """The record is chunks away from the alias whose row asks for it: the choice looks at all keys so far."""
    model, tokenizer = circuit
    samples = [*asked(tokenizer, 2, 2), *asked(tokenizer, 1, 1)]
    trimix = {"layers": "4,5,7", "shallow": {**pattern, "min_seq_len": 0, "last_n": 0}}
    assert right_answers(tmp_path, model, trimix, samples) == [True] * 3
    trimix["shallow"] |= CRIPPLED[pattern["pattern"]]
    assert right_answers(tmp_path, model, trimix, samples) == [False] * 3
