"""What can be said to a model: English, or only the language of one of this package's own models."""

from __future__ import annotations

from typing import Any

from vllm_trimix.demo.trained_task import trained_vocabulary
from vllm_trimix.demo.vocabulary import SPECIALS, vocabulary

ENGLISH, VAULT, RECORDS = LANGUAGES = ("english", "vault", "records")
"""``vault`` is what circuit models speak (demo/vocabulary.py), ``records`` trained ones (demo/trained_task.py)."""


def detect(tokenizer: Any) -> str:
    """A tokenizer's language: one of our own only where its words are exactly that language's."""
    words = tokenizer.get_vocab().keys()
    if words == set(vocabulary()):
        return VAULT
    return RECORDS if trained_keys(tokenizer) else ENGLISH


def trained_keys(tokenizer: Any) -> int:
    """How many keys a trained model's tokenizer has; 0 for any other tokenizer."""
    words = tokenizer.get_vocab().keys()
    keys = (len(words) - len(SPECIALS) - 1) // 2
    first = f"k{1:0{max(3, len(str(keys)))}}"
    # Looked up first: there is no need to compare a real vocabulary.
    return keys if keys > 0 and first in words and words == set(trained_vocabulary(keys)) else 0
