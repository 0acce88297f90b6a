"""How many tokens a model takes, as vLLM derives it from the model's configuration.

``vllm/config/model.py`` (``_get_and_verify_max_len``) and ``model_arch_config_convertor.py`` are the source; a test
holds this against them. Commands that run no engine refuse by it what an engine would refuse.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from typing import Any

_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)

# Their configurations name the stretched length already.
_UNSCALED = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")

ALLOW_LONG = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
"""vLLM's variable that lifts the limit."""


def max_length(config: Any) -> int | None:
    """Tokens that vLLM takes of a model when they are asked for, or None where it sets no limit.

    Args:
        config: Of transformers.
    """
    if os.environ.get(ALLOW_LONG, "").strip().lower() in ("1", "true"):
        return None
    length = derived_length(config)
    # A length up to this one is taken, though the model is made for fewer.
    named = getattr(config.get_text_config(), "model_max_length", None)
    return length if length is None or named is None else max(length, int(named))


def derived_length(config: Any) -> int | None:
    """Tokens that a model is made for, its rotary embedding's stretching included; None where nothing says so.

    Args:
        config: Of transformers.
    """
    text = config.get_text_config()
    named = [value for key in _KEYS if (value := getattr(text, key, None)) is not None]
    length: float = getattr(text, "model_max_length", None) or min(named, default=math.inf)
    if length == math.inf:
        return None
    if "gemma3" not in str(getattr(text, "model_type", "")):
        factor: float | None = 1.0
        for entry in _rope_entries(text):
            if _type(entry) not in _UNSCALED:
                factor = entry.get("factor", factor)
        length *= 1.0 if factor is None else factor
    return int(length)


def rope_types(text_config: Any) -> list[str]:
    """The kinds of rotary position embedding of a model, e.g. ``default`` or ``yarn``."""
    return [_type(entry) for entry in _rope_entries(text_config)]


def _rope_entries(text_config: Any) -> Iterator[Mapping[str, Any]]:
    """The rope settings, of each kind of layer where they differ; older configurations call them ``rope_scaling``."""
    entry = getattr(text_config, "rope_parameters", None) or getattr(text_config, "rope_scaling", None)
    if not isinstance(entry, Mapping):
        return
    nested = [value for value in entry.values() if isinstance(value, Mapping)]
    yield from nested or [entry]


def _type(entry: Mapping[str, Any]) -> str:
    return str(entry.get("rope_type") or entry.get("type") or "default")
