"""The ``trimix`` entry: what users may write, and what runs.

Users write ``--additional-config '{"trimix": {...}}'``. ``TrimixConfig`` is that, validated; ``resolve`` merges it
with a preset and the model's facts into the ``Resolved`` settings that every process obeys. Nothing here knows vLLM.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vllm_trimix.config.layers import check_size
from vllm_trimix.config.shallow import Shallow
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.untrusted import MAX_TOKENS, check_object, quoted

DenseBackend = Literal["FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "CPU_ATTN"]

# Twice the largest break-even of the `vllm-trimix calibrate` runs under benchmarks/results, as a margin for machines
# that are not among them, rounded up to a power of two; a test compares them.
DEFAULT_MIN_PROMPT_LEN = 4096

MAX_INTERVAL = 86400.0
"""Seconds between two lines of the log: a day. Far longer waits overflow the platform's clock."""


class ConfigurationError(Exception):
    """A server that can't start as configured. No ValueError: vLLM would wrap that in a report of its own."""


class TrimixConfig(BaseModel):
    """What users write under ``trimix``. Every key is optional; unset keys come from the preset.

    Attributes:
        starting_layer: First triangle layer; short for ``layers: "N-<last>"``.
        layers: Triangle layers, e.g. ``"5,7,10,15-35"`` or ``[5, 7]``; global indices. Empty: none.
        n_init: Sink keys, in tokens; 0 means no sinks.
        n_local: Local window, in tokens, counting the query itself.
        last_n: Dense last prompt rows, in tokens; 0 means none (the A-shape).
        min_prompt_len: Prompts shorter than this (in tokens) stay dense.
        preset: Name of a shipped preset, or path of a preset file, which may build on another by ``base``.
        dense_backend: The stock backend to build on; unset means the platform's own choice.
        prompt_logprobs: What requests that read prompt rows measure: stock vLLM ("dense") or the mask ("triangle").
        stats_log_interval: Seconds between the log lines that say what ran; 0 turns them off.
        shallow: A dynamic pattern for layers outside the triangle set, see ``vllm_trimix.config.shallow``;
            ``"dense"`` for none, where the preset has one.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    starting_layer: int | None = Field(default=None, ge=0)
    layers: str | list[int | str] | None = None
    n_init: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    n_local: int | None = Field(default=None, ge=1, le=MAX_TOKENS)
    last_n: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    min_prompt_len: int | None = Field(default=None, ge=0, le=MAX_TOKENS)
    preset: str | None = Field(default=None, min_length=1)
    dense_backend: DenseBackend | None = None
    prompt_logprobs: Literal["dense", "triangle"] = "dense"
    stats_log_interval: float = Field(default=10.0, ge=0, le=MAX_INTERVAL)
    shallow: dict[str, Any] | Literal["dense"] | None = None


class Resolved(BaseModel):
    """What runs: complete, validated, plain JSON, the same in every process of the server.

    Attributes:
        layers: Triangle layers, global indices, ascending.
        num_layers: Layers of the model.
        source: Where the layers came from, e.g. ``config``, ``preset:NAME`` or ``preset:FILE+BASE``.
        shallow: What runs in layers outside the triangle set; None: they are dense.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: tuple[int, ...]
    num_layers: int
    n_init: int
    n_local: int
    last_n: int
    min_prompt_len: int
    dense_backend: DenseBackend | None
    prompt_logprobs: Literal["dense", "triangle"]
    stats_log_interval: float
    source: str
    shallow: Shallow | None = None

    @property
    def triangle(self) -> Triangle:
        """The pattern's parameters."""
        return Triangle(n_init=self.n_init, n_local=self.n_local, last_n=self.last_n)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of everything that decides which keys a row sees."""
        words = {"dense_backend", "prompt_logprobs", "stats_log_interval", "source"}
        masks = self.model_dump_json(exclude={**dict.fromkeys(words, True), "shallow": {"notes"}})
        return hashlib.sha256(masks.encode()).hexdigest()[:16]


def parse_config(raw: object) -> TrimixConfig:
    """Validates the user's ``trimix`` entry.

    Raises:
        ValueError: Naming each bad key, its value, the limit and the nearest valid key.
    """
    if not isinstance(raw, dict):
        raise ValueError(
            f'trimix: expected a JSON object such as {{"starting_layer": 16}}, got {type(raw).__name__} {quoted(raw)}'
        )
    check_object(raw, "trimix")
    check_size(raw.get("layers"), where="trimix.layers")
    try:
        config = TrimixConfig.model_validate(raw)
    except ValidationError as error:
        raise ValueError("; ".join(_explain(raw, item) for item in _distinct(error))) from None
    if config.starting_layer is not None and config.layers is not None:
        raise ValueError(
            f"trimix: starting_layer ({quoted(config.starting_layer)}) and layers ({quoted(config.layers)}) "
            "are two spellings of one setting; keep one"
        )
    return config


def _distinct(error: ValidationError) -> list[dict[str, Any]]:
    """One error a key: pydantic reports every branch of a union."""
    found: dict[str, dict[str, Any]] = {}
    for item in error.errors():
        found.setdefault(str(item["loc"][0]), dict(item))
    return list(found.values())


def _explain(raw: dict[str, Any], item: dict[str, Any]) -> str:
    key = str(item["loc"][0])
    if item["type"] == "extra_forbidden":
        valid = list(TrimixConfig.model_fields)
        if key == "trimix" and isinstance(raw[key], dict):
            return "'trimix' stands inside itself: write its keys without it here"
        near = difflib.get_close_matches(key[:100], valid, n=1, cutoff=0.5)
        # n_last is the published kernel's own spelling of last_n.
        hint = "last_n" if key == "n_last" else near[0] if near else None
        did_you_mean = f"; did you mean '{hint}'?" if hint else ""
        return f"unknown key {quoted(key)} in trimix config{did_you_mean} (valid: {', '.join(valid)})"
    if key == "layers":
        return f'trimix.layers: {quoted(raw[key])} is not a layer list; write e.g. "16-31", "5,7,10,15-35" or [5, 7]'
    if key == "shallow":
        return f'trimix.shallow: {quoted(raw[key])} is not valid: write e.g. {{"pattern": "flexprefill"}}, or "dense"'
    message = str(item["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return f"trimix.{key}: {quoted(raw[key])} is not valid: should be {message}"
