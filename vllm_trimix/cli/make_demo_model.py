"""``vllm-trimix make-demo-model``: a small model that answers questions about long documents, without training."""

from __future__ import annotations

import argparse

from vllm_trimix.cli.arguments import add_directory
from vllm_trimix.demo.circuit_spec import DTYPES, CircuitSpec


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    default = CircuitSpec()
    parser = subparsers.add_parser(
        "make-demo-model",
        help="write a model that answers questions about long documents by construction",
        description="Writes an ordinary Llama checkpoint with hand-set weights. It answers the prompts of "
        "make-demo-prompt at any length; only its lookup layer needs full attention in the middle of the prompt.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_directory(parser, "demo")
    parser.add_argument("--layers", type=int, default=default.layers, help="decoder layers")
    parser.add_argument("--lookup-layer", type=int, default=default.lookup_layer, help="layer that reads the record")
    parser.add_argument("--answer-layer", type=int, default=default.answer_layer, help="layer that reads the answer")
    parser.add_argument("--heads", type=int, default=default.heads, help="query heads of 128")
    parser.add_argument("--kv-heads", type=int, default=default.kv_heads, help="key-value heads")
    parser.add_argument(
        "--sharpness", type=float, default=default.sharpness, help="scale on attention scores; 0.35 is soft"
    )
    parser.add_argument(
        "--distractor-heads",
        type=int,
        default=default.distractor_heads,
        help="heads of each idle layer that attend to something without effect",
    )
    parser.add_argument("--dtype", choices=DTYPES, default=default.dtype, help="of the stored weights")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Writes the checkpoint.

    Raises:
        ValueError: The options make no circuit, or the directory holds something else.
    """
    spec = CircuitSpec(
        layers=args.layers,
        lookup_layer=args.lookup_layer,
        answer_layer=args.answer_layer,
        heads=args.heads,
        kv_heads=args.kv_heads,
        sharpness=args.sharpness,
        distractor_heads=args.distractor_heads,
        dtype=args.dtype,
    )
    # Heavy: PyTorch.
    from vllm_trimix.demo.circuit import make_demo_model

    make_demo_model(args.directory, spec)
    print(f"{args.directory}: {spec.layers} layers, lookup at {spec.lookup_layer}, answer at {spec.answer_layer}")
    return 0
