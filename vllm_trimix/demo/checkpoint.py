"""The files of a checkpoint beside its weights: config.json, generation_config.json, the tokenizer.

Everything is written as plain JSON with sorted contents, so that a second run gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_trimix.demo.vocabulary import BOS, EOS, UNK, build_tokenizer, vocabulary

MAX_POSITIONS = 131072

_MARK = "trimix_generator"
# All roles are read in order: an earlier question and its answer together make one more record.
_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% if not loop.last %} {% endif %}{% endfor %}"
)


def write_checkpoint(
    directory: Path, config: dict[str, Any], *, generator: str, words: Sequence[str] | None = None
) -> None:
    """Writes config, generation config and tokenizer; makes the directory.

    Args:
        directory: New, empty, or holding a checkpoint that this function wrote.
        config: Contents of config.json, without the token ids and the generator mark.
        generator: The command that makes the checkpoint, kept in config.json.
        words: The tokens in the order of their ids; None for the demo language's.

    Raises:
        ValueError: The directory is a file or holds something else.
    """
    refuse_foreign(directory)
    directory.mkdir(parents=True, exist_ok=True)
    words = vocabulary() if words is None else words
    token_ids = {
        "bos_token_id": words.index(BOS),
        "eos_token_id": words.index(EOS),
        "pad_token_id": words.index(EOS),
    }
    _write_json(directory / "config.json", config | token_ids | {_MARK: generator})
    _write_json(directory / "generation_config.json", token_ids | {"do_sample": False})
    build_tokenizer(words).save(str(directory / "tokenizer.json"))
    _write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "unk_token": UNK,
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "model_max_length": config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            "chat_template": _CHAT_TEMPLATE,
        },
    )


def refuse_foreign(directory: Path) -> None:
    """Somebody's real model must not lose its config.json to a mistyped path.

    Raises:
        ValueError: The directory is a file or holds something that no command of this package wrote.
    """
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    try:
        ours = _MARK in json.loads((directory / "config.json").read_text())
    except (OSError, ValueError):
        ours = False
    if not ours:
        raise ValueError(f"directory: {str(directory)!r} holds files that are not a demo model; choose a new directory")


def _write_json(path: Path, contents: dict[str, Any]) -> None:
    path.write_text(json.dumps(contents, indent=2, sort_keys=True) + "\n", encoding="utf-8")
