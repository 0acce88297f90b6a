"""Prompts with contents, for patterns that choose keys by what is there, as a custom dataset of ``vllm bench serve``.

``kv-retrieval``: the prompts of the published speed test, key-value pairs of UUIDs, cut to a number of tokens.
``document``: the demo language's documents, which circuit models answer questions about.
A file: passages of that text, cut anywhere; what models with trained weights attend to is known only on real text.
"""

from __future__ import annotations

import functools
import json
import random
import re
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from vllm_trimix.demo.prompts import make_demo_prompt
from vllm_trimix.measurement.prompt_text import draw_uuid, json_pairs
from vllm_trimix.untrusted import read_text

RANDOM, KV_RETRIEVAL, DOCUMENT = KINDS = ("random", "kv-retrieval", "document")
# The published speed test: lengths, pairs and the one asked for. It cuts what is longer, the question with it, warms up
# once per length and reports the mean of 3.
PUBLISHED_LENGTHS = tuple(range(32000, 128001, 16000))
_PAIRS, _GOLD = 6000, 3000
_MIN_PAIR_TOKENS = 24
# More than any token of a text takes on average, so that a passage needs no second cut.
_TOKEN_CHARACTERS = 8
_UUID = re.compile(r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def write_dataset(kind: str, model: Path, file: Path, *, length: int, count: int, seed: int) -> None:
    """Writes ``count`` prompts of exactly ``length`` tokens each, JSON lines; the same for the same arguments.

    Args:
        kind: ``kv-retrieval``, ``document`` or a text's file.
        model: Folder with the tokenizer.
        file: Ends in ``.jsonl``.
        length: Tokens of each, with those that the tokenizer adds.
        count: Prompts.
        seed: Names them.

    Raises:
        ValueError: The tokenizer can't make such prompts, or the text is too short.
        OSError: The text can't be read.
    """
    own: dict[str, Callable[[Any, int, int], str]] = {KV_RETRIEVAL: kv_retrieval, DOCUMENT: document}
    make = own.get(kind) or functools.partial(passage, read_text(Path(kind), "--prompts"), kind)
    texts = [make(tokenizer_of(str(model)), length, 1000 * seed + number) for number in range(count)]
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))


def check_kind(kind: str) -> None:
    """Refuses what ``--prompts`` doesn't take.

    Raises:
        ValueError: Neither a name nor an existing file.
    """
    if kind not in KINDS and not Path(kind).is_file():
        raise ValueError(f"--prompts: {kind!r} is neither a text's file nor one of {', '.join(KINDS)}")


@functools.lru_cache(maxsize=1)
def tokenizer_of(model: str) -> Any:
    """The model's tokenizer; it may say that a prompt is long."""
    # Heavy; random prompts need none.
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def kv_retrieval(tokenizer: Any, length: int, seed: int) -> str:
    """A JSON object of 6000 pairs of UUIDs and the question for one in the middle, cut to ``length`` tokens.

    More pairs where those are too short. A tokenizer of whole words, which knows no UUID, gets each as 16 four-digit
    numbers, one a byte: about as many tokens as others make of it.

    Raises:
        ValueError: No text near there has exactly that many tokens.
    """
    generator = random.Random(seed)
    pairs = max(_PAIRS, length // _MIN_PAIR_TOKENS)
    names = [draw_uuid(generator) for _ in range(2 * pairs)]
    gold = names[2 * _GOLD]
    data = json_pairs(zip(names[::2], names[1::2], strict=True))
    text = (
        "Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n"
        f'{data}\n\nKey: "{gold}"\nThe value associated with the specified key is: '
    )
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokenizer(gold).input_ids[1:2]:
        text = _UUID.sub(lambda match: _as_numbers(match[0]), text)
    return _cut(tokenizer, text, length)


def _as_numbers(name: str) -> str:
    return " ".join(str(1000 + byte) for byte in uuid.UUID(name).bytes)


def document(tokenizer: Any, length: int, seed: int) -> str:
    """A demo document that ends in a one-hop question.

    Raises:
        ValueError: The tokenizer is not the demo language's.
    """
    text = make_demo_prompt(tokens=length, hops=1, seed=seed).prompt
    ids = tokenizer(text).input_ids
    if len(ids) != length or tokenizer.unk_token_id in ids:
        raise ValueError(
            f"--prompts {DOCUMENT}: the model's tokenizer is not the demo language's; name a model of "
            f"vllm-trimix make-demo-model, or use --prompts {KV_RETRIEVAL}"
        )
    return text


def passage(text: str, name: str, tokenizer: Any, length: int, seed: int) -> str:
    """A passage of a text from a word that the seed draws.

    Raises:
        ValueError: The text is too short, or no cut near there has exactly that many tokens.
    """
    room = length * _TOKEN_CHARACTERS
    if len(text) < room:
        raise ValueError(f"--prompts {name}: {len(text)} characters are too few for {length} tokens; {room} suffice")
    begin = random.Random(seed).randint(0, len(text) - room)
    return _cut(tokenizer, text[begin : begin + room].partition(" ")[2], length, kind=name)


def _cut(tokenizer: Any, text: str, length: int, *, kind: str = KV_RETRIEVAL) -> str:
    """The beginning of a text that has exactly ``length`` tokens by itself."""
    ends = [end for _, end in tokenizer(text, return_offsets_mapping=True).offset_mapping]
    if len(ends) < length:
        raise ValueError(f"--prompts {kind}: {len(ends)} tokens are all that {len(text)} characters give, not {length}")
    # A cut may make other tokens of what is before it: one more or less.
    for wanted in (length, *(length + step for near in range(1, 9) for step in (-near, near))):
        if 0 < wanted <= len(ends):
            part = text[: ends[wanted - 1]]
            if len(tokenizer(part).input_ids) == length:
                return part
    raise ValueError(f"--prompts {kind}: no cut of the text gives exactly {length} tokens; try {length + 1}")
