"""``vllm-trimix probe``: finds the triangle layers of a model, with the evidence."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from vllm_trimix.cli import arguments, hf_model
from vllm_trimix.cli.output import serve_command
from vllm_trimix.config.layers import format_layers
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import SCORES


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "probe",
        help="find the triangle layers of a model, and write them as a preset with the evidence",
        description="Measures, with Hugging Face transformers, how much each layer's Middle Q-K section (what the "
        "triangle hides) matters for answers, ranks the layers by it, and takes as many as leave held-out answers as "
        "likely as they were. Writes preset.json, scores.json, report.md and plots. Stopped, it goes on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    arguments.add_model(parser)
    arguments.add_output(parser, "trimix-probe")
    add("--prompts", type=Path, metavar="FILE", help='JSON lines {"prompt": ..., "answer": ...} instead of generated')
    add("--length", type=int, default=8192, metavar="N", help="longest generated prompt, in tokens")
    add("--samples", type=int, default=16, metavar="K", help="generated prompts; half of them are held out")
    add("--method", choices=("gradient", "ablation", "both"), default="gradient", help="ablation: slower, the truth")
    add("--score", choices=SCORES, default="contribution", help="gradient score that ranks the layers")
    add("--objective", choices=("logit", "logprob"), default="logit", help="what the gradient is of")
    add("--random-orders", type=int, default=2, metavar="R", help="random layer orders to compare with")
    add("--n-init", type=int, default=Triangle.n_init)
    add("--n-local", type=int, default=Triangle.n_local)
    add("--last-n", type=int, default=Triangle.last_n)
    hf_model.add_flags(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Probes. Returns 1 if no layer can be a triangle layer, or the answers are wrong anyway.

    Raises:
        ValueError: Something the user got wrong, or too little memory.
        OSError: A file that can't be read or written.
    """
    pattern = _pattern(args)
    hf_model.check_surroundings(args)
    # Heavy: PyTorch.
    from vllm_trimix.probing import memory, probe, prompts, report
    from vllm_trimix.probing.saved import Saved

    source = hf_model.find(args)
    outline = source.outline()
    probe.check_layers(outline)
    limit, tokenizer = source.max_length, source.tokenizer
    template = hf_model.template_arguments(args, tokenizer)
    if args.prompts is None:
        is_default = args.length == args.parser.get_default("length")
        [args.length] = hf_model.within([args.length], limit, flag="--length", is_default=is_default)
    if args.prompts is not None:
        chosen = prompts.read(args.prompts, tokenizer, template_arguments=template)
    else:
        chosen = prompts.generate(
            tokenizer, length=args.length, count=args.samples, seed=args.seed, template_arguments=template
        )
    if len(chosen) < 4:
        raise ValueError(f"{len(chosen)} prompts: two to score and two held out for the choice are the least; add some")
    prompts.check_lengths(chosen, pattern, max_length=limit)
    longest = max(len(prompt.sample.prompt) + len(prompt.sample.answer) for prompt in chosen)
    needed = memory.needed_bytes(outline, length=longest, dtype=source.dtype)
    memory.check(needed, length=longest, dtype=source.dtype, device=source.device)
    settings = probe.Settings(
        model=args.model,
        pattern=pattern,
        method=args.method,
        score=args.score,
        objective=args.objective,
        num_random=args.random_orders,
        seed=args.seed,
        prompts=hashlib.sha256(json.dumps([(p.text, p.answer) for p in chosen]).encode()).hexdigest()[:16],
        dtype=source.dtype_name,
        device=source.device.type,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    saved = Saved(args.output / "progress.json", settings, what="probe")
    kinds = [*prompts.describe(chosen), *hf_model.template_words(source.tokenizer, template)]
    print(f"vllm-trimix: {'; '.join(kinds)}; up to {needed / 2**30:.1f} GiB on {source.device}", file=sys.stderr)
    with hf_model.Bars() as bars:
        outcome = probe.run(
            source.model(),
            settings,
            # By pairs, as generated prompts are of two kinds by turns.
            scored=[prompt.sample for index, prompt in enumerate(chosen) if index % 4 < 2],
            held_out=[prompt.sample for index, prompt in enumerate(chosen) if index % 4 >= 2],
            saved=saved,
            progress=bars.update,
        )
    preset = report.write(
        args.output,
        outcome,
        environment=hf_model.environment(source.device),
        prompts=kinds,
        command=hf_model.command(args),
    )
    return _say(outcome, preset, args.output)


def _say(outcome: Any, preset: Path, folder: Path) -> int:
    # Heavy: PyTorch.
    from vllm_trimix.probing.report import count, stock_sentence

    print(f"triangle layers: {format_layers(outcome.chosen)} ({count(outcome)})")
    if outcome.stock:
        print(stock_sentence(outcome.stock))
    print(f"report: {folder / 'report.md'}")
    if outcome.correct["importance"][0] < 0.5:
        print("The model rarely gives these answers even densely: the choice proves little. Take other --prompts.")
        return 1
    if not outcome.chosen:
        print("No layer can be a triangle layer without a loss on these prompts.")
        return 1
    entry = {"preset": str(preset)}
    print(f"serve: {serve_command(outcome.settings.model, entry)}")
    return 0


def _pattern(args: argparse.Namespace) -> Triangle:
    for flag, value, least in (
        ("--n-init", args.n_init, 0),
        ("--n-local", args.n_local, 1),
        ("--last-n", args.last_n, 0),
        ("--samples", args.samples, 4),
        ("--random-orders", args.random_orders, 0),
        ("--length", args.length, 1),
    ):
        if value < least:
            raise ValueError(f"{flag}: {value} is too small; the least is {least}")
    pattern = Triangle(args.n_init, args.n_local, args.last_n)
    if args.prompts is None and pattern.is_dense(args.length):
        raise ValueError(
            f"--length: the triangle hides nothing up to {pattern.dense_len} tokens (n_init + n_local + last_n), "
            f"got {args.length}"
        )
    return pattern
