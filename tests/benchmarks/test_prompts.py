"""Prompts with contents: their length to the token, and what is in them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from benchmarks.serving.prompts import KV_RETRIEVAL, check_kind, kv_retrieval, tokenizer_of, write_dataset
from vllm_trimix.demo.bench_model import SHAPES, make_bench_model

pytest.importorskip("transformers", reason="prompts are cut by a tokenizer; vLLM brings transformers")
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "bench"
    make_bench_model(directory, SHAPES["bench-8l"])
    return directory


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-pair tokenizer, as real models have: a cut of the text may change the tokens before it."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([(ROOT / "tests/data/prose.txt").read_text()], trainer)
    directory = tmp_path_factory.mktemp("bpe")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


def prompts(kind: str, model: Path, file: Path, **load: int) -> list[str]:
    write_dataset(kind, model, file, **load)
    return [json.loads(line)["prompt"] for line in file.read_text().splitlines()]


@pytest.mark.parametrize("length", [600, 1777, 32000])
@pytest.mark.parametrize("tokens", ["words", "bytes"])
def test_every_prompt_has_its_length_and_is_another(
    model: Path, bpe: Path, tmp_path: Path, tokens: str, length: int
) -> None:
    folder = model if tokens == "words" else bpe
    load: dict[str, Any] = {"length": length, "count": 2, "seed": 7}
    texts = prompts(KV_RETRIEVAL, folder, tmp_path / "p.jsonl", **load)
    ids = [tokenizer_of(str(folder))(text).input_ids for text in texts]
    assert {len(one) for one in ids} == {length}
    assert texts[0] != texts[1]
    assert prompts(KV_RETRIEVAL, folder, tmp_path / "p.jsonl", **load) == texts
    assert texts[0] not in prompts(KV_RETRIEVAL, folder, tmp_path / "p.jsonl", **{**load, "seed": 8})
    if tokens == "words":
        unknown = ids[0].count(tokenizer_of(str(folder)).unk_token_id)
        # Quotes and the instruction; each UUID is 16 words that the model knows.
        assert unknown < 0.3 * length
        assert len(set(ids[0])) > 200
    else:
        assert len(re.findall(r'"[0-9a-f-]{36}": "[0-9a-f-]{36}"', texts[0])) > length / 100 - 1


def test_longer_prompts_have_more_pairs(model: Path) -> None:
    tokenizer = tokenizer_of(str(model))
    assert len(tokenizer(kv_retrieval(tokenizer, 400_000, 0)).input_ids) == 400_000


def test_passages_of_a_text(bpe: Path, tmp_path: Path) -> None:
    text, file = ROOT / "tests/data/prose.txt", tmp_path / "p.jsonl"
    load = {"length": 300, "count": 3, "seed": 7}
    found = prompts(str(text), bpe, file, **load)
    assert {len(tokenizer_of(str(bpe))(one).input_ids) for one in found} == {300}
    assert all(one in text.read_text() for one in found)
    assert len(set(found)) == 3
    assert prompts(str(text), bpe, file, **load) == found
    with pytest.raises(ValueError, match=r"characters are too few for 900000 tokens; 7200000 suffice"):
        prompts(str(text), bpe, file, **{**load, "length": 900_000})
    check_kind(str(text))
    with pytest.raises(ValueError, match="--prompts: 'nowhere' is neither a text's file nor one of random, kv"):
        check_kind("nowhere")


def test_documents_need_the_demo_language(model: Path, bpe: Path, tmp_path: Path) -> None:
    [text] = prompts("document", model, tmp_path / "p.jsonl", length=1024, count=1, seed=1)
    assert len(tokenizer_of(str(model))(text).input_ids) == 1024
    assert re.search(r"The vault code of \w+ is$", text)
    with pytest.raises(ValueError, match="--prompts document: the model's tokenizer is not the demo language's"):
        prompts("document", bpe, tmp_path / "p.jsonl", length=1024, count=1, seed=1)


def test_the_client_sends_them_as_they_are(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="the client is vLLM's")
    from vllm.benchmarks.datasets.datasets import get_samples

    from benchmarks.serving.client import Load, _parser, bench_arguments

    file = tmp_path / "p.jsonl"
    texts = prompts(KV_RETRIEVAL, model, file, length=700, count=3, seed=1)
    load = Load(700, 3, decode_tokens=4, seed=1, dataset=file)
    arguments = _parser().parse_args(bench_arguments(Mock(port=1), model, load))
    samples = get_samples(arguments, tokenizer_of(str(model)))
    assert [sample.prompt for sample in samples] == texts
    assert {(sample.prompt_len, sample.expected_output_len) for sample in samples} == {(700, 5)}
    assert arguments.ignore_eos
