"""What ``vllm-trimix eval`` is asked to compare: tasks, lengths, depths and configurations, read and checked."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
from collections.abc import Mapping, Sequence
from typing import Any

from vllm_trimix.cli import hf_model
from vllm_trimix.cli.engine_limit import Limit
from vllm_trimix.cli.output import teller
from vllm_trimix.config.entry import Resolved
from vllm_trimix.config.layer_types import type_reason
from vllm_trimix.config.resolve import resolve
from vllm_trimix.measurement import chat_template

_say = teller("eval")


def suite(args: argparse.Namespace, there: Mapping[str, Any]) -> Any:
    """The suite that is asked for, and nothing that only another one reads.

    Raises:
        ValueError: No such suite, or a flag of another.
    """
    if args.suite not in there:
        raise ValueError(
            f"SUITE: {args.suite!r} is not a suite{_near(args.suite, there)}; there are {', '.join(there)}"
        )
    for flag, value, reader in (
        ("--prompts", args.prompts, "agreement"),
        ("--documents", ", ".join(map(str, args.documents)) or None, "agreement"),
        ("--text", args.text, "ppl"),
        ("--depths", args.depths, "niah"),
    ):
        if value is not None and args.suite != reader:
            raise ValueError(f"{flag}: {value}: only the suite {reader} reads it; leave it out for {args.suite}")
    if args.documents and (args.prompts is not None or args.chat_template):
        other = "--chat-template" if args.chat_template else "--prompts"
        raise ValueError(f"--documents: the texts go on by themselves, they ask nothing; leave {other} or them out")
    return there[args.suite]


def thought_end(args: argparse.Namespace, tokenizer: Any, template: Mapping[str, Any]) -> str:
    """What ends the thoughts that answers begin with; empty where thinking is off.

    Raises:
        ValueError: There is no chat template, it refuses a question, or thoughts have no room.
    """
    if args.chat_template and not chat_template.has_template(tokenizer):
        raise ValueError(f"--chat-template: the tokenizer of {args.model} has no chat template; leave the flag out")
    if not args.chat_template:
        if template and args.prompts is None:
            raise ValueError("--chat-template-kwargs: prompts are no turns of the chat template; add --chat-template")
        return ""
    turns = [{"role": "user", "content": "a"}]
    chat_template.render(tokenizer, turns, where="--chat-template", arguments=template, answered=False)
    end = chat_template.thought_end(tokenizer, template)
    if end is not None and args.max_answer_tokens is None and args.suite != "agreement":
        raise ValueError(
            f"--chat-template-kwargs: {args.chat_template_kwargs} lets the model think, and a thought needs more room "
            "than the published answers have: add --max-answer-tokens, e.g. 4096, or leave thinking off"
        )
    return end or ""


def tasks(asked: str | None, suite: Any, language: str) -> dict[str, Any]:
    """``--tasks``: the suite's that can be said in the model's language.

    Raises:
        ValueError: A task that isn't among them.
    """
    there = suite.tasks.get(language, {})
    if not there:
        raise ValueError(f"SUITE: {suite.name} has no task in the language of this model ({language})")
    if asked is None:
        return dict(there)
    names = [name for name in asked.split(",") if name]
    for name in names:
        if name not in there:
            everywhere = {task for tasks in suite.tasks.values() for task in tasks}
            why = f"can't be said in the language of this model ({language})" if name in everywhere else "is not a task"
            raise ValueError(f"--tasks: {name!r} {why}{_near(name, there)}; {suite.name} has {', '.join(there)}")
    return {name: there[name] for name in there if name in names}


def flag(flags: Sequence[str], name: str) -> str | None:
    """What an engine flag is given, as ``NAME VALUE`` or ``NAME=VALUE``; None where it isn't there."""
    for word, after in zip(flags, [*flags[1:], None], strict=False):
        if word == name:
            return after
        if word.startswith(f"{name}="):
            return word.removeprefix(f"{name}=")
    return None


def lengths(asked: str | None, default: Sequence[int], limit: Limit, model: str) -> tuple[int, ...]:
    """``--lengths``, ascending; by default those of the suite that the model is made for.

    Args:
        asked: As given.
        default: The suite's.
        limit: Tokens that are taken, less what answers have on top.
        model: Its name.

    Raises:
        ValueError: No length, or more than is taken.
    """
    if asked is None:
        fitting = tuple(default)
        for most, why in (
            (limit.usual, f"{model} takes {limit.usual}"),
            (limit.held, f"the memory that is free holds a KV cache for {limit.held}; --lengths asks them anyway"),
        ):
            dropped = [str(length) for length in fitting if most is not None and length > most]
            if dropped:
                _say(f"left out {', '.join(dropped)} tokens: {why}")
                fitting = tuple(length for length in fitting if str(length) not in dropped)
        # A model of short prompts is asked as long ones as it takes.
        return fitting or (int(limit.usual or default[0]),)
    found = []
    for text in asked.split(","):
        if not text.strip().isdecimal() or int(text) == 0:
            raise ValueError(f"--lengths: {text!r} is not a number of tokens; write e.g. 4096,16384")
        if limit.longest is not None and int(text) > limit.longest:
            raise ValueError(f"--lengths: {text} tokens: {model} takes {limit.longest}; choose at most that")
        found.append(int(text))
    return tuple(sorted(set(found)))


def wanted_lengths(asked: str | None, default: Sequence[int]) -> list[int]:
    """What ``--lengths`` may come to, for the question how much is taken; what is no number is refused later."""
    if asked is None:
        return list(default)
    return [int(text) for text in asked.split(",") if text.strip().isdecimal()]


def depths(asked: str | None) -> tuple[float, ...]:
    """``--depths``, ascending; empty for the suite's own.

    Raises:
        ValueError: No share.
    """
    found = []
    for text in asked.split(",") if asked else ():
        try:
            depth = float(text)
        except ValueError:
            depth = -1.0
        if not 0 <= depth <= 1:
            raise ValueError(f"--depths: {text!r} is not a share from 0 (start) to 1 (end); write e.g. 0,0.5,1")
        found.append(depth)
    return tuple(sorted(set(found)))


def configurations(args: argparse.Namespace, source: hf_model.Description, needed: Any) -> list[Any]:
    """All configurations, each checked against the model before an engine is started.

    Raises:
        ValueError: What was asked for doesn't go together, or doesn't fit the model.
    """
    # Heavy: scipy and the suites' own packages.
    from vllm_trimix.evaluation import ablations, askers
    from vllm_trimix.evaluation.configurations import STOCK, TRIMIX, noise_floor, parse, read_entry

    base = read_entry("--trimix", args.trimix)
    found = parse(args.configs, base, args.config)
    if args.noise_floor is not None:
        _check_noise_floor(args)
        found.insert(1, noise_floor(args.noise_floor))
    if args.server:
        unfit = [c.name for c in found if c.name not in (STOCK, TRIMIX)]
        if unfit or args.ablation or args.config or args.trimix != "{}" or args.flags:
            raise ValueError(
                "--server: a running server has its configuration already: compare stock and trimix on it, without "
                "--trimix, --config, --ablation and engine flags, or leave out --server"
            )
        askers.connect(args.server, args.served)
        return found
    if args.ablation:
        varied = ablations.Base(
            _resolve(base, args.model, source),
            able=able_layers(source.config, trust_remote_code=args.trust_remote_code),
            order=ablations.read_order(args.probe) if args.probe else None,
            seed=args.seed,
        )
        found += ablations.configurations(args.ablation, base, varied)
    for configuration in found:
        if configuration.entry is not None:
            try:
                _resolve(configuration.entry, args.model, source)
            except ValueError as error:
                raise ValueError(f"configuration {configuration.name}: {error}") from None
    return [
        configuration
        if configuration.entry is None
        else dataclasses.replace(configuration, entry={**needed, **configuration.entry})
        for configuration in found
    ]


def _check_noise_floor(args: argparse.Namespace) -> None:
    if args.server:
        raise ValueError("--noise-floor: a running server cuts prompts in one way; leave --noise-floor or --server out")
    if flag(args.flags, "--max-num-batched-tokens") == str(args.noise_floor):
        raise ValueError(
            f"--noise-floor: {args.noise_floor} tokens is what --max-num-batched-tokens gives stock; take another"
        )


def _resolve(entry: dict[str, Any], model: str, source: hf_model.Description) -> Resolved:
    text = source.config.get_text_config()
    return resolve(
        entry,
        model=model,
        num_layers=text.num_hidden_layers,
        model_entry=getattr(source.config, "trimix", None),
        num_heads=text.num_attention_heads,
        text_config=text,
    )


def able_layers(config: Any, *, trust_remote_code: bool) -> list[int]:
    """Layers that can be triangle layers, as the model without its weights tells."""
    # Heavy: PyTorch.
    from vllm_trimix.hf_attention import stock_layers
    from vllm_trimix.probing.loading import outline

    text = config.get_text_config()
    try:
        stock = stock_layers(outline(config, trust_remote_code=trust_remote_code))
    except ValueError:
        # Of a model that transformers can't run: what its configuration says.
        kinds = getattr(text, "layer_types", None) or ()
        stock = {layer: reason for layer, kind in enumerate(kinds) if (reason := type_reason(str(kind)))}
    return [layer for layer in range(text.num_hidden_layers) if layer not in stock]


def _near(name: str, there: Any) -> str:
    """A hint at what was perhaps meant."""
    found = difflib.get_close_matches(name, list(there), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
