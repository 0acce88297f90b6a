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
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.probing import SCORES

_LENGTHS = {"cpu": (2048,), "cuda": (8192, 32768)}
_BUDGET = 8.0


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "probe",
        help="find the triangle layers of a model, and write them as a preset with the evidence",
        description="Measures, with Hugging Face transformers, how much each layer's Middle Q-K section (what the "
        "triangle hides) matters for answers, ranks the layers by it, and takes as many as surely leave held-out "
        "answers as they were. First it asks which tasks the model does; where it does none, its own dense answers are "
        "the reference. Writes preset.json, scores.json, report.md and plots. Stopped, it goes on where it was.",
    )
    add = parser.add_argument
    arguments.add_model(parser)
    arguments.add_output(parser, "trimix-probe")
    add("--prompts", type=Path, metavar="FILE", help='JSON lines {"prompt": ..., "answer": ...} instead of generated')
    add(
        "--documents",
        type=Path,
        nargs="+",
        metavar="FILE",
        help="texts whose pieces are the prompts; the model's own dense answers are the reference",
    )
    add(
        "--self-consistency",
        action="store_true",
        help="hold answers against the model's own dense ones, though it may know the right ones",
    )
    add(
        "--lengths",
        "--length",
        metavar="TOKENS,...",
        help="of prompts; the shortest ranks, and the choice must hold at each (default: 2048 on a CPU, "
        "8192,32768 on a GPU, as far as the model goes)",
    )
    add("--scored", type=int, default=4, metavar="K", help="prompts that rank the layers (default: %(default)s)")
    add(
        "--samples",
        type=int,
        default=64,
        metavar="K",
        help="held-out prompts of each length, for the choice; fewer where the time doesn't allow them (default: "
        "%(default)s)",
    )
    add(
        "--time-budget",
        type=float,
        metavar="MINUTES",
        help=f"how long it may take; refused if the fewest prompts take longer (default: {_BUDGET:g}, not refused)",
    )
    add(
        "--method",
        choices=("gradient", "ablation", "both"),
        default="gradient",
        help="what ranks the layers: gradients, or how far answers diverge with one layer alone in triangle; both "
        "compares the two (default: %(default)s)",
    )
    add("--score", choices=SCORES, default="contribution", help="gradient score that ranks (default: %(default)s)")
    add("--objective", choices=("logit", "logprob"), default="logit", help="of the gradient (default: %(default)s)")
    add("--random-orders", type=int, default=2, metavar="R", help="random orders to compare (default: %(default)s)")
    for name, default in (("n-init", Triangle.n_init), ("n-local", Triangle.n_local), ("last-n", Triangle.last_n)):
        add(f"--{name}", type=int, default=default, metavar="N", help="(default: %(default)s)")
    hf_model.add_flags(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Probes. Returns 1 if no layer can be a triangle layer, or nothing is proven; then there is no preset.

    Raises:
        ValueError: Something the user got wrong, or too little memory.
        OSError: A file that can't be read or written.
    """
    pattern = _pattern(args)
    hf_model.check_surroundings(args)
    # Heavy: PyTorch.
    from vllm_trimix.probing import memory, probe, prompts, report
    from vllm_trimix.probing.material import OWN_TOKENS, Material
    from vllm_trimix.probing.outcome import Settings
    from vllm_trimix.probing.saved import Saved

    source = hf_model.find(args)
    outline = source.outline()
    source = hf_model.precise(args, source, outline)
    probe.check_layers(outline)
    tokenizer = source.tokenizer
    template = hf_model.template_arguments(args, tokenizer)
    given = _given(args, source, pattern, template)
    own = (max(len(prompt.sample.prompt) for prompt in given),) if given else ()
    lengths: tuple[int, ...] = own or _lengths(args, source, pattern)
    asked = Material(
        tokenizer=tokenizer,
        lengths=lengths,
        seed=args.seed,
        tasks=() if given or args.documents else prompts.tasks_for(tokenizer),
        template_arguments=template,
        given=given,
        documents=args.documents or (),
        own=args.self_consistency,
    )
    for length in lengths if not given else ():
        # What is wrong with them shows now.
        asked.draw("held out", length, 1)
    longest = lengths[-1] + max([OWN_TOKENS, *(len(prompt.sample.answer) for prompt in given)])
    needed = memory.needed_bytes(outline, length=longest, dtype=source.dtype)
    memory.check(needed, length=longest, dtype=source.dtype, device=source.device, flag="--lengths")
    texts = [path.read_bytes().hex() for path in args.documents or ()] or [(p.text, p.answer) for p in given]
    settings = Settings(
        model=args.model,
        pattern=pattern,
        method=args.method,
        score=args.score,
        objective=args.objective,
        num_random=args.random_orders,
        seed=args.seed,
        lengths=lengths,
        prompts=hashlib.sha256(json.dumps([texts, args.self_consistency, dict(template)]).encode()).hexdigest()[:16],
        scored=min(args.scored, len(given) - asked.most) if given and asked.most else args.scored,
        samples=min(args.samples, asked.most or args.samples),
        dtype=source.dtype_name,
        device=source.device.type,
    )
    args.output.mkdir(parents=True, exist_ok=True)
    saved = Saved(args.output / "progress.json", settings, what="probe")
    kinds = [*prompts.describe(given), *hf_model.template_words(tokenizer, template)]
    print(f"vllm-trimix: up to {needed / 2**30:.1f} GiB on {source.device}", file=sys.stderr)
    with hf_model.Bars() as bars:
        outcome = probe.Probe(source.model(), settings, saved=saved, progress=bars.update).run(
            asked,
            budget=60 * (args.time_budget or _BUDGET),
            hard=args.time_budget is not None,
            tell=lambda words: print(f"vllm-trimix: {'; '.join([words, *kinds])}", file=sys.stderr),
        )
    report.write(
        args.output,
        outcome,
        environment=hf_model.environment(source.device),
        kinds=kinds,
        command=hf_model.command(args),
    )
    return _say(outcome, args.output)


def _say(outcome: Any, folder: Path) -> int:
    # Heavy: PyTorch.
    from vllm_trimix.probing import words

    for line in words.console(outcome):
        print(line)
    print(f"report: {folder / 'report.md'}")
    if not outcome.chosen:
        return 1
    entry = {"preset": str(folder / "preset.json")}
    print(f"serve: {serve_command(outcome.settings.model, entry)}")
    return 0


def _given(args: argparse.Namespace, source: Any, pattern: Triangle, template: Any) -> list[Any]:
    """A file's prompts.

    Raises:
        ValueError: Too few or too short ones, or ones without an answer that is asked for.
        OSError: The file can't be read.
    """
    # Heavy: PyTorch.
    from vllm_trimix.probing import prompts

    if args.prompts is None:
        return []
    # With the model's own answers as the reference those of the file aren't needed.
    answers = None if args.self_consistency else True
    found: list[Any] = prompts.read(args.prompts, source.tokenizer, answers=answers, template_arguments=template)
    if len(found) < 4:
        raise ValueError(f"{len(found)} prompts: two to score and two held out for the choice are the least; add some")
    prompts.check_lengths(found, pattern, max_length=source.max_length)
    return found


def _lengths(args: argparse.Namespace, source: Any, pattern: Triangle) -> tuple[int, ...]:
    """Of generated prompts and pieces of documents, ascending.

    Raises:
        ValueError: No length, or one at which the triangle hides nothing or that the model doesn't take.
    """
    asked = args.lengths or ",".join(map(str, _LENGTHS[source.device.type]))
    words = [word.strip() for word in str(asked).split(",") if word.strip()]
    for word in words:
        if not word.isdecimal() or int(word) < 1:
            raise ValueError(f"--lengths: {word!r} is no number of tokens; write e.g. 2048,8192")
    found = sorted({int(word) for word in words})
    for length in found:
        if pattern.is_dense(length):
            raise ValueError(
                f"--lengths: the triangle hides nothing up to {pattern.dense_len} tokens (n_init + n_local + last_n), "
                f"got {length}"
            )
    return tuple(sorted(hf_model.within(found, source.max_length, flag="--lengths", is_default=args.lengths is None)))


def _pattern(args: argparse.Namespace) -> Triangle:
    for flag, value, least in (
        ("--n-init", args.n_init, 0),
        ("--n-local", args.n_local, 1),
        ("--last-n", args.last_n, 0),
        ("--scored", args.scored, 2),
        ("--samples", args.samples, 2),
        ("--random-orders", args.random_orders, 0),
    ):
        if value < least:
            raise ValueError(f"{flag}: {value} is too small; the least is {least}")
    if args.time_budget is not None and not args.time_budget > 0:
        raise ValueError(f"--time-budget: {args.time_budget:g} minutes is no time; choose more than 0")
    if args.prompts is not None and (args.documents or args.lengths):
        other = "--documents" if args.documents else "--lengths"
        raise ValueError(f"--prompts: {args.prompts} brings prompts of its own; leave out {other}")
    return Triangle(args.n_init, args.n_local, args.last_n)
