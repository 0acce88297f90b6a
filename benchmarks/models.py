"""Which model a benchmark runs: a checkpoint, or a bench shape with random weights."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

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


def check_lengths(lengths: list[int], model: Path, *, answer_tokens: int) -> None:
    """Refuses lengths that the model can't serve.

    Raises:
        ValueError: Naming the length and the limit.
    """
    limit = read_config(model).get("max_position_embeddings")
    for length in lengths:
        if length < 1:
            raise ValueError(f"--lengths: {length} is not a prompt length; the least is 1 token")
        if limit is not None and length + answer_tokens > limit:
            raise ValueError(
                f"--lengths: {length} prompt tokens and {answer_tokens} for the answer exceed the model's {limit} "
                f"(max_position_embeddings); choose at most {limit - answer_tokens}"
            )
