"""``vllm-trimix make-demo-prompt``: a prompt of a given length for the demo model, with its answer."""

from __future__ import annotations

import argparse
import dataclasses
import json

from vllm_trimix.demo.prompts import MIN_TOKENS, make_demo_prompt


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "make-demo-prompt",
        help="print a long prompt for the demo model, with its answer",
        description="Prints a document that ends in a question, as JSON with the right answer and the answer of a "
        "model whose lookup layer is sparse.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tokens", type=int, required=True, help="length of the prompt, with BOS")
    parser.add_argument(
        "--hops", type=int, choices=sorted(MIN_TOKENS), default=1, help="1: a record answers; 2: an alias and a record"
    )
    parser.add_argument("--seed", type=int, default=0, help="which of the prompts of this length")
    parser.add_argument("--format", choices=("json", "text"), default="json", help="text: the prompt alone")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the prompt.

    Raises:
        ValueError: Too few tokens for a document.
    """
    prompt = make_demo_prompt(tokens=args.tokens, hops=args.hops, seed=args.seed)
    print(prompt.prompt if args.format == "text" else json.dumps(dataclasses.asdict(prompt), indent=2))
    return 0
