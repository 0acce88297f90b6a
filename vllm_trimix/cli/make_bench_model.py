"""``vllm-trimix make-bench-model``: a model without weights, in the shape of a real one, for measuring speed."""

from __future__ import annotations

import argparse
import dataclasses

from vllm_trimix.cli.arguments import add_directory
from vllm_trimix.demo.bench_model import SHAPES, make_bench_model

_DEFAULT_SHAPE = "bench-8l"
_SIZES = {
    "hidden_size": "width of the residual stream",
    "layers": "decoder layers",
    "heads": "query heads",
    "kv_heads": "key-value heads",
    "head_size": "width of a head",
    "intermediate_size": "width of the MLP",
    "vocab_size": "rows of the embedding, at least the demo tokenizer's",
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "make-bench-model",
        help="write a config and tokenizer for --load-format dummy",
        description="Writes config.json and the demo tokenizer, no weights: serve it with --load-format dummy. "
        "Sizes that are given replace those of the shape.",
    )
    add_directory(parser, "bench")
    parser.add_argument(
        "--shape", choices=sorted(SHAPES), default=_DEFAULT_SHAPE, help="a named shape (default: %(default)s)"
    )
    for name, meaning in _SIZES.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, help=f"{meaning} (default: the shape's)")
    parser.add_argument("--trimix-layers", metavar="LAYERS", help='write a trimix entry for these layers, e.g. "4-7"')
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the files.

    Raises:
        ValueError: The sizes make no model, or the directory holds something else.
    """
    given = {name: getattr(args, name) for name in _SIZES if getattr(args, name) is not None}
    shape = dataclasses.replace(SHAPES[args.shape], **given)
    make_bench_model(args.directory, shape, trimix_layers=args.trimix_layers)
    print(
        f"{args.directory}: {shape.layers} layers, hidden {shape.hidden_size}, {shape.heads} heads and "
        f"{shape.kv_heads} KV heads of {shape.head_dim}; load with --load-format dummy"
    )
    return 0
