"""``vllm-trimix make-trained-model``: a small model trained from scratch to answer questions about records."""

from __future__ import annotations

import argparse
import dataclasses

from vllm_trimix.cli.arguments import add_directory
from vllm_trimix.demo.trained_spec import SIZES


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command to the command line."""
    parser = subparsers.add_parser(
        "make-trained-model",
        help="train a small retrieval model from scratch",
        description="Trains a Llama on key-value records (k012 v034 k007 v101 ... ? k012) and writes an ordinary "
        "checkpoint. It answers documents of up to --records records, not longer ones. The small size takes about "
        "two to five minutes on a CPU core; the large one is an estimate for a GPU and has never been trained. "
        "Nothing is written before the training is done.",
    )
    add_directory(parser, "trained")
    parser.add_argument("--size", choices=sorted(SIZES), default="small", help="of the model (default: %(default)s)")
    records = ", ".join(f"{name} {spec.records}" for name, spec in SIZES.items())
    parser.add_argument("--records", type=int, metavar="N", help=f"of the longest documents (default: {records})")
    parser.add_argument("--seed", type=int, default=0, help="of weights and documents (default: %(default)s)")
    limits = ", ".join(f"{name} {spec.steps_limit}" for name, spec in SIZES.items())
    parser.add_argument("--steps-limit", type=int, metavar="N", help=f"give up after these steps (default: {limits})")
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where there is one (default)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Trains the model and writes the checkpoint.

    Raises:
        ValueError: Bad options, a directory that holds something else, or a training that failed.
    """
    given = {name: getattr(args, name) for name in ("records", "steps_limit") if getattr(args, name) is not None}
    spec = dataclasses.replace(SIZES[args.size], **given)
    # Heavy.
    import torch
    from tqdm import tqdm

    from vllm_trimix.demo.trained import Progress, make_trained_model

    device = args.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device: 'cuda' is not available here; choose cpu")
    options = [f"--{name.replace('_', '-')} {value}" for name, value in given.items()]
    command = " ".join(["vllm-trimix make-trained-model DIR", f"--size {args.size} --seed {args.seed}", *options])

    with tqdm(unit="step", leave=False) as bar:

        def show(progress: Progress) -> None:
            bar.set_description(f"{progress.records} records, accuracy {progress.accuracy:.2f}", refresh=False)
            bar.update()

        trained = make_trained_model(args.directory, spec, seed=args.seed, device=device, command=command, on_step=show)
    accuracy = ", ".join(f"{share:.3f} at {records}" for records, share in trained.accuracy.items())
    print(f"{args.directory}: {trained.steps} steps; accuracy {accuracy} records")
    return 0
