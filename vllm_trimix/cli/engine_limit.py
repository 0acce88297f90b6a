"""How long the prompts of a command may be: as long as the engine, or the server, that it asks takes them."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

from vllm_trimix.config.context import derived_length, max_length
from vllm_trimix.config.kv_cache import SPACE, fitting_tokens, token_bytes
from vllm_trimix.measurement.engine_process import EngineDied, EngineProcess

_ENGINE = "vllm_trimix.backend.engines.limits"

# Engine flags that decide it, as vLLM's parser takes them: shortened, with a value behind = or a key behind a dot.
_FLAGS = (
    "--max-model-len",
    "--hf-overrides",
    "--hf-config-path",
    "--config-format",
    "--disable-sliding-window",
    "--revision",
    "--config",
)

# By these the user chooses the KV cache.
_CACHE_FLAGS = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")


class Limit(NamedTuple):
    """How long prompt and answer may be together, in tokens.

    Attributes:
        longest: What is taken when it is asked for; None: anything.
        usual: What is taken by itself; None where nothing says so.
        held: What a KV cache in this machine's memory holds beside the model; None where a GPU computes, or the user
            has chosen the cache.
    """

    longest: int | None
    usual: int | None
    held: int | None = None

    def less(self, tokens: int) -> Limit:
        """What is left of it beside as many tokens."""
        return Limit(*(None if limit is None else limit - tokens for limit in self))


def find(args: argparse.Namespace, config: Any, wanted: Sequence[int]) -> Limit:
    """The limit for ``eval``: a running server's, or what engines take with the user's flags.

    Args:
        args: With ``model``, ``flags``, ``server`` and ``served``.
        config: Of transformers, for the model.
        wanted: Lengths that may be asked, in tokens.

    Raises:
        ValueError: Flags that vLLM doesn't take, or no server.
    """
    here = Limit(max_length(config), derived_length(config))
    if args.server:
        return _served(args.server, args.served) or here
    held = _held(config, args.flags)
    if not any(_decides(flag) for flag in args.flags):
        return here._replace(held=held)
    job = {"model": args.model, "flags": args.flags, "lengths": sorted(wanted)}
    with EngineProcess(_ENGINE, job) as engine:
        try:
            found = engine.wait_ready()
        except EngineDied as died:
            raise ValueError(str(died)) from None
    return Limit(found["longest"], found["usual"], held)


def _held(config: Any, flags: Sequence[str]) -> int | None:
    if os.environ.get(SPACE) or any(flag.replace("_", "-").startswith(_CACHE_FLAGS) for flag in flags):
        return None
    # Heavy.
    import psutil
    import torch

    if torch.accelerator.is_available():
        return None
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_size = getattr(text, "head_dim", None) or (text.hidden_size // heads if isinstance(heads, int) else None)
    if not isinstance(kv_heads, int) or not isinstance(head_size, int):
        # Layers that differ: vLLM alone knows.
        return None
    per_token = token_bytes(
        num_layers=text.num_hidden_layers,
        num_kv_heads=kv_heads,
        head_size=head_size,
        itemsize=(getattr(config, "dtype", None) or torch.float32).itemsize,
    )
    return fitting_tokens(per_token, free=psutil.virtual_memory().available)


def _decides(flag: str) -> bool:
    name = flag.partition("=")[0].partition(".")[0].replace("_", "-")
    return len(name) > len("--") and any(known.startswith(name) for known in _FLAGS)


def _served(url: str, model: str | None) -> Limit | None:
    """What the server's ``/v1/models`` says; an adapter's entry leaves it to that of its base model."""
    # Of the extra `eval`.
    from vllm_trimix.evaluation import askers

    client, name = askers.connect(url, model)
    with client:
        found = {entry.id: getattr(entry, "max_model_len", None) for entry in client.models.list()}
    length = found.get(name) or next((value for value in found.values() if value), None)
    return None if length is None else Limit(int(length), int(length))
