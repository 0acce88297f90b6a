"""``vllm-trimix search``: finds a pattern for each head of a model, with the evidence."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

from vllm_trimix.cli import arguments, hf_model
from vllm_trimix.cli.output import serve_command
from vllm_trimix.config.identity import known_id
from vllm_trimix.config.layers import format_layers, parse_layers
from vllm_trimix.config.resolve import resolve
from vllm_trimix.patterns.triangle import Triangle
from vllm_trimix.searching import ADAPTIVE, HEAD_BUDGET, SCORES, TOLERANCE


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "search",
        help="find a sparse pattern for each head, and write them as a head file with the evidence",
        description="Measures, with Hugging Face transformers, what each candidate pattern would cost each head (keys "
        "that the kernels would really load) and lose it (error of the attention output), and gives each head the best "
        "one within a budget. Writes heads.json, search.json, report.md and plots. Stopped, it goes on where it was.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    arguments.add_model(parser)
    arguments.add_output(parser, "trimix-search")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='JSON lines {"prompt": ..., "answer": ...} (.jsonl), or a text, instead of generated KV retrieval',
    )
    add(
        "--lengths",
        default="8192",
        metavar="N,...",
        help="lengths of generated prompts or of parts of a text, in tokens",
    )
    add("--samples", type=int, default=2, metavar="K", help="generated prompts of each length")
    add("--layers", metavar="LAYERS", help="layers to search, e.g. 0-15; unset: those that no preset makes triangle")
    add("--candidates", type=Path, metavar="FILE", help="JSON list of patterns instead of the published candidates")
    add("--also", default="", metavar="NAME,...", help=f"adaptive candidates to add: {', '.join(ADAPTIVE)}")
    add("--score", choices=SCORES, default="output-error", help="what ranks candidates; recall: attention kept")
    add(
        "--budget",
        type=float,
        metavar="F",
        help="share of dense attention's keys that a layer's heads may read together",
    )
    add(
        "--head-budget",
        type=float,
        default=HEAD_BUDGET,
        metavar="F",
        help="the same of each head, where --budget is unset",
    )
    add("--tolerance", type=float, default=TOLERANCE, help="what a layer may lose for cheaper candidates")
    add("--last-n", type=int, default=Triangle.last_n, help="last rows of a prompt, which stay dense")
    add("--chunk", type=int, metavar="N", help="prefill in chunks of as many tokens, as a server does; unset: at once")
    hf_model.add_flags(parser)
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Searches. Returns 1 if the choice spoils answers that dense attention gives.

    Raises:
        ValueError: Something the user got wrong, or too little memory.
        OSError: A file that can't be read or written.
    """
    lengths, also = _check(args)
    hf_model.check_surroundings(args)
    # Heavy: PyTorch.
    from vllm_trimix import hf_attention
    from vllm_trimix.patterns.registry import describe
    from vllm_trimix.probing import memory, prompts
    from vllm_trimix.searching import candidates, measure, report, search
    from vllm_trimix.searching.choice import Budget

    if args.candidates is not None:
        given = candidates.read(args.candidates)
    source = hf_model.find(args)
    outline = source.outline()
    source = hf_model.precise(args, source, outline)
    num_layers = hf_attention.layers.num_layers(outline)
    triangle = _triangle_layers(source, num_layers)
    layers = _without_stock(outline, _layers(args.layers, triangle, num_layers), named=args.layers is not None)
    chosen = _prompts(args, source, lengths)
    longest = max(len(prompt.sample.prompt) + len(prompt.sample.answer) for prompt in chosen)
    if args.candidates is None:
        given = candidates.published(longest, also=also)
    needed = measure.needed_bytes(outline, length=longest, dtype=source.dtype, candidates=given)
    memory.check(
        needed, length=longest, dtype=source.dtype, device=source.device, what="search", flag="--lengths or --prompts"
    )
    settings = search.Settings(
        model=args.model,
        candidates=tuple(describe(pattern) for pattern in given),
        layers=layers,
        last_n=args.last_n,
        chunk=args.chunk,
        prompts=hashlib.sha256(json.dumps([(p.text, p.sample.prompt, p.answer) for p in chosen]).encode()).hexdigest()[
            :16
        ],
        dtype=source.dtype_name,
        device=source.device.type,
    )
    state = args.output / "progress"
    state.mkdir(parents=True, exist_ok=True)
    kinds = [
        *prompts.describe(chosen),
        *hf_model.template_words(source.tokenizer, hf_model.template_arguments(args, source.tokenizer)),
    ]
    print(f"vllm-trimix: {'; '.join(kinds)}; up to {needed / 2**30:.1f} GiB on {source.device}", file=sys.stderr)
    with hf_model.Bars() as bars:
        outcome = search.run(
            source.model(),
            settings,
            candidates=given,
            samples=[prompt.sample for prompt in chosen],
            score=args.score,
            budget=Budget(args.head_budget, "head") if args.budget is None else Budget(args.budget, "layer"),
            tolerance=args.tolerance,
            folder=state,
            progress=bars.update,
        )
    found = report.Source(hf_model.environment(source.device), kinds, hf_model.command(args))
    heads = report.write(args.output, outcome, found)
    return _say(outcome, heads, args.output, triangle)


def _say(outcome: Any, heads: Path, folder: Path, triangle: tuple[int, ...] | None) -> int:
    # Heavy: PyTorch.
    from vllm_trimix.searching import report

    searched = tuple(outcome.layers)
    print(f"layers {format_layers(searched)} read {outcome.density:.1%} of dense attention's keys")
    print(report.answers_line(outcome))
    poor = report.poor_heads(outcome)
    if poor:
        worst = ", ".join(f"layer {head.layer} head {head.head} ({head.loss:.2f})" for head in poor[:3])
        print(
            f"{len(poor)} heads lose more than {report.POOR:.0%} with the best candidate that they can afford: {worst}"
            f"{', ...' if len(poor) > 3 else ''}. --budget F shares the keys of a layer: such heads may take more."
        )
    print(f"report: {folder / 'report.md'}")
    if sum(item.correct for item in outcome.sparse) < sum(item.correct for item in outcome.dense):
        print("The choice spoils answers that dense attention gives: raise the budget before you serve it.")
        return 1
    entry = serve_entry(outcome, heads, triangle)
    print(f"serve: {serve_command(outcome.settings.model, entry)}")
    return 0


def serve_entry(outcome: Any, heads: Path, triangle: tuple[int, ...] | None) -> dict[str, Any]:
    """The ``trimix`` entry that serves a head file.

    Args:
        outcome: What was found.
        heads: The head file.
        triangle: Triangle layers of the model's preset; None: it has none, and the entry must name some.
    """
    searched, rest = set(outcome.layers), set(triangle or ())
    if searched <= rest:
        # The user searched triangle layers: they are no longer triangle layers.
        rest -= searched
    entry: dict[str, Any] = {}
    if triangle is None or rest != set(triangle):
        entry["layers"] = format_layers(rest) if rest else ""
    shallow: dict[str, Any] = {"heads": str(heads)}
    if searched - rest != set(range(outcome.num_layers)) - rest:
        shallow["layers"] = format_layers(searched - rest)
    if outcome.settings.last_n != Triangle.last_n:
        shallow["last_n"] = outcome.settings.last_n
    return {**entry, "shallow": shallow}


def _check(args: argparse.Namespace) -> tuple[list[int], tuple[str, ...]]:
    """Lengths, and names of adaptive candidates."""
    for flag, value, least in (
        ("--samples", args.samples, 1),
        ("--last-n", args.last_n, 0),
        ("--chunk", args.chunk, 1),
        ("--tolerance", args.tolerance, 0),
    ):
        if value is not None and not value >= least:
            raise ValueError(f"{flag}: {value} is too small; the least is {least}")
    for flag, share in (("--budget", args.budget), ("--head-budget", args.head_budget)):
        if share is not None and not 0 < share <= 1:
            raise ValueError(f"{flag}: {share} is no share of dense attention's keys; choose more than 0, 1 at most")
    lengths = []
    for word in args.lengths.split(","):
        if not word.strip().isdecimal() or int(word) <= args.last_n:
            raise ValueError(
                f"--lengths: {word.strip()!r} is no length of more than {args.last_n} tokens, the last rows that stay "
                "dense (--last-n); write e.g. 4096,8192"
            )
        lengths.append(int(word))
    also = tuple(word.strip() for word in args.also.split(",") if word.strip())
    for name in also:
        if name not in ADAPTIVE:
            raise ValueError(f"--also: {name!r} is not an adaptive pattern (valid: {', '.join(ADAPTIVE)})")
    if also and args.candidates is not None:
        raise ValueError("--also adds to the published candidates; name the patterns in the --candidates file instead")
    return lengths, also


def _prompts(args: argparse.Namespace, source: hf_model.Source, lengths: list[int]) -> Any:
    """Prompts, with the model's limit checked."""
    # Heavy: PyTorch.
    from vllm_trimix.probing import prompt_files, prompts

    tokenizer, limit = source.tokenizer, source.max_length
    template = hf_model.template_arguments(args, tokenizer)
    lines = args.prompts is not None and prompt_files.is_json(args.prompts)
    if not lines:
        is_default = args.lengths == args.parser.get_default("lengths")
        lengths = hf_model.within(lengths, limit, flag="--lengths", is_default=is_default)
    if args.prompts is None:
        chosen = []
        for length in lengths:
            chosen += prompts.generate(
                tokenizer,
                # The published search's, or the hardest one in the model's own language.
                prompts.tasks_for(tokenizer)[-1:],
                length=length,
                count=args.samples,
                seed=args.seed,
                template_arguments=template,
            )
    elif lines:
        chosen = prompts.read(args.prompts, tokenizer, answers=False, template_arguments=template)
    else:
        chosen = prompts.read_text(args.prompts, tokenizer, lengths=lengths, flag="--lengths")
    prompts.check_max_length(chosen, limit)
    for index, prompt in enumerate(chosen, start=1):
        if len(prompt.sample.prompt) <= args.last_n:
            raise ValueError(
                f"prompt {index} has {len(prompt.sample.prompt)} tokens: all its rows are among the last "
                f"{args.last_n}, which stay dense (--last-n); take longer prompts"
            )
    return chosen


def _triangle_layers(source: hf_model.Source, num_layers: int) -> tuple[int, ...] | None:
    """Triangle layers of the preset that serving would take; None: there is none."""
    entry = getattr(source.config, "trimix", None)
    if entry is None and known_id(source.name) is None:
        return None
    return resolve(None, model=source.name, num_layers=num_layers, model_entry=entry).layers


def _layers(spec: str | None, triangle: Collection[int] | None, num_layers: int) -> tuple[int, ...]:
    if spec is None:
        layers = tuple(layer for layer in range(num_layers) if layer not in (triangle or ()))
        if not layers:
            raise ValueError(
                f"all {num_layers} layers are triangle layers by the model's preset; name some by --layers"
            )
        return layers
    layers = parse_layers(spec, num_layers=num_layers, where="--layers")
    if not layers:
        raise ValueError(f"--layers: {spec!r} names no layer; write e.g. 0-15")
    return layers


def _without_stock(model: Any, layers: tuple[int, ...], *, named: bool) -> tuple[int, ...]:
    """Layers that can't be sparse stay as they are, as in vLLM."""
    # Heavy: PyTorch.
    from vllm_trimix.hf_attention.layers import describe, layer_heads
    from vllm_trimix.probing.probe import check_layers

    stock = check_layers(model)
    found = {layer: stock[layer] for layer in layers if layer in stock}
    if named and found:
        raise ValueError(f"--layers: {format_layers(found)} stay as they are ({describe(found)}); leave them out")
    left = tuple(layer for layer in layers if layer not in found)
    if not left:
        raise ValueError(f"no layer is left to search: all stay as they are ({describe(found)})")
    if found:
        print(f"vllm-trimix: layers that stay as they are: {describe(found)}", file=sys.stderr)
    heads = {layer: layer_heads(model, layer)[0] for layer in left}
    if len(set(heads.values())) > 1:
        raise ValueError(
            f"layers {format_layers(left)} have {min(heads.values())} to {max(heads.values())} query heads; a head "
            "file has as many in each, so take layers alike by --layers"
        )
    return left
