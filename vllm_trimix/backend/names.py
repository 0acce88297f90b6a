"""Under which names vLLM, its configuration and its requests know this backend."""

from __future__ import annotations

import difflib
from typing import Any

NAME = "TRIMIX"
CLASS_PATH = "vllm_trimix.backend.attention.TrimixBackend"

ENTRY = "trimix"
"""The user's entry in ``additional_config``."""
RESOLVED = "trimix_resolved"
"""What runs, beside it; written by ``settings``."""

KEY = "trimix"
"""A request's own argument, in ``vllm_xargs``."""
ALLOWED = ("on", "triangle", "off")
"""Its values."""
DENSE_KEY = "trimix_dense"
"""Stamped by admission, read by workers; users may not set it."""


OWN_KEYS = ("starting_layer", "n_init", "n_local", "last_n", "min_prompt_len", "stats_log_interval", "shallow")
"""Of the entry; those that no other plugin's configuration is likely to have."""

_MEANT = ("trimix", "trianglemix", "vllmtrimix")
# No one's key is longer, and a hostile one is not worth comparing.
_MAX_KEY = 40


def misnamed_entry(additional: Any) -> str | None:
    """The key of ``additional_config`` under which an entry for this backend stands by another name, or None.

    Entries are pasted from other ports (``trianglemix``), from memory (``tri_mix``), or by the backend's name.
    """
    for key, value in additional.items() if isinstance(additional, dict) else ():
        if not isinstance(key, str) or len(key) > _MAX_KEY or key in (ENTRY, RESOLVED) or not isinstance(value, dict):
            continue
        letters = "".join(letter for letter in key.lower() if letter.isalnum()).removesuffix("config")
        if difflib.get_close_matches(letters, _MEANT, n=1, cutoff=0.8):
            return key
    return None


def misplaced(additional: Any) -> str | None:
    """A key of ``additional_config`` that was meant for this backend, where it reads nothing, or None."""
    if not isinstance(additional, dict) or ENTRY in additional or RESOLVED in additional:
        return None
    return misnamed_entry(additional) or next((key for key in OWN_KEYS if key in additional), None)


def uses_trimix(vllm_config: Any) -> bool:
    """Whether any attention layer of this engine was asked to use TRIMIX."""
    attention = vllm_config.attention_config
    per_kind = getattr(attention, "backend_per_kind", None) or {}
    return any(getattr(backend, "name", None) == NAME for backend in (attention.backend, *per_kind.values()))


def reads_prompt_rows(params: Any) -> bool:
    """Whether a request's answer depends on the outputs of prompt rows."""
    return params.prompt_logprobs is not None or getattr(params, "prompt_logprob_token_ids", None) is not None
