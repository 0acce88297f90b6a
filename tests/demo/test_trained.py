"""The trained model: the committed one answers and shows the misalignment."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.demo.trained_model import LENGTHS, MODEL, SPEC, held_out, load
from vllm_trimix.demo import trained
from vllm_trimix.demo.misalignment import answer_accuracy, misalignment
from vllm_trimix.demo.trained_spec import QUESTIONS, repeats_of, tokens_of
from vllm_trimix.demo.trained_task import make_trained_prompt, trained_vocabulary
from vllm_trimix.patterns.triangle import Triangle

LOOKUP_LAYER = 2  # Found by measuring; another training may put it elsewhere.
PATTERN = Triangle(n_init=2, n_local=6, last_n=4)


@pytest.fixture(scope="module")
def model() -> Any:
    return load(MODEL)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


# The committed model.


@pytest.mark.parametrize("records", LENGTHS)
def test_answers_are_right(model: Any, records: int) -> None:
    assert answer_accuracy(model, held_out(records)) >= 0.98


@pytest.mark.parametrize("records", [24, 96])
def test_answers_are_right_at_every_distance(model: Any, records: int) -> None:
    longest = 2 * (records + repeats_of(records))
    prompts = [make_trained_prompt(records=records, seed=1, distance=far) for far in range(2, longest + 1, 2)]
    assert answer_accuracy(model, prompts) >= 0.98


@pytest.mark.parametrize(
    ("records", "pattern"),
    [(24, PATTERN), (96, PATTERN), (96, Triangle(n_init=8, n_local=32, last_n=16))],
    ids=["24-window6", "96-window6", "96-window32"],
)
def test_the_triangle_keeps_the_answer_and_loses_recall(model: Any, records: int, pattern: Triangle) -> None:
    scores = misalignment(model, held_out(records, 4800 // records), pattern)
    assert min(dataclasses.astuple(scores["dense"])) >= 0.99
    assert scores["triangle"].answer >= 0.98
    assert scores["streaming"].answer <= 0.25
    for name in ("triangle", "streaming"):
        assert scores[name].hidden_recall <= 0.02
        assert scores[name].recall <= 0.6
    # Its rows see more than streaming's, only at the end.
    assert 0 < scores["triangle"].recall - scores["streaming"].recall <= 0.1


def test_one_layer_of_the_committed_model_needs_the_middle(model: Any) -> None:
    prompts = held_out(24)

    def recall(*layers: int) -> float:
        return misalignment(model, prompts, PATTERN, layers=layers)["triangle"].hidden_recall

    assert recall() == misalignment(model, prompts, PATTERN)["dense"].hidden_recall
    assert recall(*range(SPEC.layers)) == misalignment(model, prompts, PATTERN)["triangle"].hidden_recall
    alone = [recall(layer) for layer in range(SPEC.layers)]
    assert alone.pop(LOOKUP_LAYER) <= 0.2
    assert min(alone) >= 0.97
    assert recall(*(layer for layer in range(SPEC.layers) if layer != LOOKUP_LAYER)) >= 0.85


def test_a_reply_is_the_answer_and_stops(tokenizer: Any) -> None:
    served = load(MODEL, torch.bfloat16)
    for prompt in (*held_out(24, 5), *held_out(96, 5)):
        inputs = tokenizer(prompt.prompt, return_tensors="pt")
        assert inputs.input_ids.shape[1] == prompt.tokens
        reply = served.generate(**inputs, max_new_tokens=4)[0, prompt.tokens :]
        assert tokenizer.convert_ids_to_tokens(reply) == [prompt.answer, "</s>"]


def test_tokenizer(tokenizer: Any) -> None:
    words = trained_vocabulary(SPEC.keys)
    assert (len(words), words[4], words[-1]) == (4 + 2 * SPEC.keys, "k001", "v128")
    text = " ".join(words[3:])
    ids = tokenizer(text).input_ids
    assert ids == [1, *range(3, len(words))]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.model_max_length) == (1, 2, SPEC.max_positions)
    chat = [{"role": "user", "content": "k001 v002"}, {"role": "user", "content": "? k001"}]
    rendered = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert tokenizer(rendered, add_special_tokens=False).input_ids == tokenizer("k001 v002 ? k001").input_ids


def test_files_are_what_the_code_makes() -> None:
    config = json.loads((MODEL / "config.json").read_text())
    assert config == json.loads(json.dumps(config | trained.config_of(SPEC)))
    assert config["max_position_embeddings"] >= tokens_of(96, QUESTIONS) + 1
    provenance = json.loads((MODEL / "provenance.json").read_text())
    assert provenance["settings"] == dataclasses.asdict(SPEC)
    assert provenance["command"] == "vllm-trimix make-trained-model DIR --size small --seed 0"
    assert min(provenance["accuracy"].values()) >= trained.MIN_ACCURACY
    weights = load_file(MODEL / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 1e6
    _, info = AutoModelForCausalLM.from_pretrained(MODEL, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))


# Prompts.


@pytest.mark.parametrize("records", [4, 5, 24, 128])
@pytest.mark.parametrize("seed", range(5))
def test_prompts_say_where_things_are(records: int, seed: int) -> None:
    prompt = make_trained_prompt(records=records, seed=seed)
    text = ["<s>", *prompt.prompt.split()]
    assert prompt == make_trained_prompt(records=records, seed=seed) != make_trained_prompt(records=records, seed=99)
    assert prompt.tokens == len(text) == tokens_of(records)
    assert text[prompt.key_position] == text[-1]
    assert text[prompt.key_position + 1] == prompt.answer
    assert prompt.distance == len(text) - 1 - (prompt.key_position + 1)
    assert text.count(text[-1]) == 2, "the asked record is stated once"
    keys, values = text[1:-2:2], text[2:-2:2]
    assert len(set(keys)) == len(set(values)) == len(set(zip(keys, values, strict=True))) == records
    places = [1 + 2 * place for place, key in enumerate(keys) if key in keys[:place]]
    assert [repeat.position for repeat in prompt.repeats] == places
    for repeat in prompt.repeats:
        assert text[repeat.position + 1] == repeat.value
        assert list(repeat.earlier) == [i for i in range(repeat.position) if text[i] == repeat.value]


@pytest.mark.parametrize("records", [4, 24])
def test_questions_at_every_distance(records: int) -> None:
    for distance in range(2, 2 * (records + repeats_of(records)) + 1, 2):
        for seed in range(20):
            assert make_trained_prompt(records=records, seed=seed, distance=distance).distance == distance


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"records": 3}, "records: 3 is outside 4-128; the model has 128 keys"),
        ({"records": 129}, "records: 129 is outside 4-128; the model has 128 keys"),
        ({"records": 8, "distance": 22}, "distance: 22 is not an even number of tokens from 2 to 20"),
        ({"records": 8, "distance": 3}, "distance: 3 is not an even number of tokens from 2 to 20"),
        ({"records": 8, "distance": 0}, "distance: 0 is not an even number of tokens from 2 to 20"),
    ],
)
def test_impossible_prompts(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}$"):
        make_trained_prompt(seed=0, **arguments)


# Measuring.


class Reader:
    """Predicts the value of a key from any statement of it that the mask shows, else nothing."""

    dtype = torch.float32

    def __init__(self) -> None:
        self.config = SimpleNamespace(vocab_size=len(trained_vocabulary(SPEC.keys)))

    def parameters(self) -> Iterator[torch.Tensor]:
        return iter([torch.zeros(1)])

    def __call__(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        previous = torch.nn.functional.pad(input_ids, (1, 0))[:, :-1]
        found = (input_ids[:, :, None] == previous[:, None, :]) & (attention_mask[:, 0] == 0)
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        logits[..., 0] = 0.5
        for row, i, j in found.nonzero().tolist():
            logits[row, i, input_ids[row, j]] = 1.0
        return SimpleNamespace(logits=logits)


def test_scores_of_a_reader_that_sees_what_the_mask_shows() -> None:
    prompts = held_out(24, 60)
    scores = misalignment(Reader(), prompts, PATTERN)
    assert dataclasses.astuple(scores["dense"]) == (1.0, 1.0, 1.0)
    near = sum(prompt.distance < PATTERN.n_local or prompt.key_position + 1 < PATTERN.n_init for prompt in prompts)
    assert scores["streaming"].answer == near / len(prompts) < 1
    assert scores["triangle"].answer == 1.0
    repeats = [(repeat, prompt.tokens) for prompt in prompts for repeat in prompt.repeats]
    seen = [
        repeat.position >= tokens - PATTERN.last_n or repeat.position - max(repeat.earlier) < PATTERN.n_local
        for repeat, tokens in repeats
    ]
    assert scores["triangle"].recall == sum(seen) / len(seen) < 1
    assert scores["triangle"].hidden_recall == scores["streaming"].hidden_recall == 0.0


def test_a_triangle_that_hides_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"pattern: .* hides no repeat in prompts of 63 tokens; choose a smaller one"):
        misalignment(Reader(), held_out(24, 2), Triangle())
