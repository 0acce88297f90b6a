"""Tokenizers: a small byte-pair one, as real models have, and those of our own models."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from vllm_trimix.demo.trained_task import trained_vocabulary
from vllm_trimix.demo.vocabulary import BOS, UNK, build_tokenizer, vocabulary

ROOT = Path(__file__).parents[2]
TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@functools.cache
def english(template: str | None = None, *, max_length: int = 512) -> Any:
    """Every text becomes tokens and back; some special token may be its start. Warns of texts above ``max_length``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<s>"],
        show_progress=False,
    )
    words = [word for word in vocabulary() if word.isalpha()]
    tokenizer.train_from_iterator([(ROOT / "tests/data/prose.txt").read_text(), " ".join(words)], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", model_max_length=max_length)
    made.chat_template = template
    return made


@functools.cache
def vault() -> Any:
    """The circuit models'."""
    return _own(vocabulary())


@functools.cache
def records(keys: int = 2048) -> Any:
    """The trained models'."""
    return _own(trained_vocabulary(keys))


def _own(words: tuple[str, ...]) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=build_tokenizer(words), bos_token=BOS, unk_token=UNK)


def characters(template: str | None = None) -> Any:
    """A token for each character, quickly made."""
    vocab = {"<unk>": 0, "<s>": 1, **{chr(code): code for code in range(2, 128)}}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("(?m:.)"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    made.chat_template = template
    return made
