"""Which model a benchmark runs: a checkpoint, or a bench shape with random weights."""

from __future__ import annotations

import argparse
import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil

from vllm_trimix.config.context import max_length
from vllm_trimix.config.kv_cache import SPACE, cache_bytes, token_bytes
from vllm_trimix.demo.bench_model import SHAPES, make_bench_model


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """``--model`` and ``--shape``, the same in every benchmark."""
    parser.add_argument("--model", type=Path, metavar="DIR", help="a checkpoint's folder; default: the bench shape")
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), default="bench-8l", help="shape with random weights (default: %(default)s)"
    )


def prepare_model(model: Path | None, shape: str, scratch: Path) -> Path:
    """The folder to serve: ``model``, or one written for the shape.

    Args:
        model: A checkpoint's folder, or None.
        shape: One of ``SHAPES``.
        scratch: Where a shape is written.

    Raises:
        ValueError: ``model`` is not a model's folder.
    """
    if model is None:
        directory = scratch / shape
        make_bench_model(directory, SHAPES[shape])
        return directory
    if not (model / "config.json").is_file():
        raise ValueError(f"--model: {str(model)!r} holds no config.json; name a checkpoint's folder, or use --shape")
    return model


def read_config(model: Path) -> dict[str, Any]:
    """The text model's part of config.json."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())
    return config.get("text_config", config)


def kv_cache_space(
    model: Path, max_model_len: int, *, arguments: Sequence[str] = (), engines: int = 1
) -> dict[str, str]:
    """vLLM's variable for the size of a KV cache on a CPU, as the prompts need it.

    Empty where the user has chosen, or where a GPU computes.

    Args:
        model: The folder.
        max_model_len: Longest prompt and answer, in tokens.
        arguments: The user's engine arguments.
        engines: How many share the memory that is free.

    Raises:
        ValueError: The longest prompt doesn't fit.
    """
    chosen = ("--gpu-memory-utilization", "--kv-cache-memory-bytes")
    if (
        os.environ.get(SPACE)
        or shutil.which("nvidia-smi")
        or any(argument.replace("_", "-").startswith(chosen) for argument in arguments)
    ):
        return {}
    config = read_config(model)
    heads = config["num_attention_heads"]
    per_token = token_bytes(
        num_layers=config["num_hidden_layers"],
        num_kv_heads=config.get("num_key_value_heads") or heads,
        head_size=config.get("head_dim") or config["hidden_size"] // heads,
        # Of fp32, whatever the engine takes.
        itemsize=4,
    )
    free = psutil.virtual_memory().available // engines
    return {SPACE: str(-(-cache_bytes(per_token, max_model_len, free=free) // 2**30))}


def check_lengths(lengths: list[int], model: Path, *, answer_tokens: int) -> None:
    """Refuses lengths that the model can't serve.

    Raises:
        ValueError: Naming the length and the limit.
    """
    config = SimpleNamespace(**read_config(model))
    config.get_text_config = lambda: config
    limit = max_length(config)
    for length in lengths:
        if length < 1:
            raise ValueError(f"--lengths: {length} is not a prompt length; the least is 1 token")
        if limit is not None and length + answer_tokens > limit:
            raise ValueError(
                f"--lengths: {length} prompt tokens and {answer_tokens} for the answer exceed the model's {limit}; "
                f"choose at most {limit - answer_tokens}"
            )
