"""``vllm-trimix eval``: is it lossless? The same prompts through several configurations, task by task."""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_trimix.cli import arguments, engine_limit, eval_choices, hf_model
from vllm_trimix.cli.output import teller
from vllm_trimix.config.entry import Resolved
from vllm_trimix.measurement import chat_template
from vllm_trimix.measurement.engine_process import EngineDied

TAKES_ENGINE_FLAGS = True

_say = teller("eval")
_SUITES = ("ruler", "niah", "retrieval", "ppl", "agreement", "long")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "eval",
        help="compare TRIMIX with stock vLLM on your model, task by task, with intervals",
        usage="vllm-trimix eval SUITE MODEL [options] [-- ENGINE FLAGS]",
        description="Asks each configuration the same prompts through the real engine, one engine after the other, and "
        "reports for each task and length the score, its paired difference to stock with a 95% interval, and the time "
        "to the first token. Writes answers.jsonl, result.json, report.md and plots. Stopped, it goes on where it was.",
        epilog="After -- come engine flags of vllm serve: vllm-trimix eval ruler MODEL -- --tensor-parallel-size 2",
    )
    add = parser.add_argument
    add("suite", metavar="SUITE", help=f"{', '.join(_SUITES)}; see docs/evaluation.md")
    arguments.add_model(parser, f"{arguments.CAUSAL_MODEL}; its tokenizer makes the prompts")
    add("--tasks", metavar="NAME,...", help="of the suite (default: all)")
    add("--lengths", metavar="TOKENS,...", help="prompt and answer together (default: the published ones that fit)")
    add("--samples", type=arguments.whole, metavar="N", help="prompts of each task and length (default: the suite's)")
    add("--depths", metavar="SHARE,...", help="where the needle lies, 0 to 1, for niah (default: 0,0.1,...,1)")
    add(
        "--configs",
        default="stock,trimix",
        metavar="NAME,...",
        help="stock, trimix, preset files (default: %(default)s)",
    )
    add("--config", action="append", default=[], metavar="NAME=JSON", help="a configuration by its trimix entry")
    arguments.add_trimix(parser, "the trimix entry, where no preset fits; base of ablations", default="{}")
    add(
        "--ablation",
        action="append",
        default=[],
        metavar="NAME[=VALUE,...]",
        help="vary one thing: last_n, n_init, n_local, starting_layer, num_layers, shape, random_layers, static",
    )
    add("--probe", type=Path, metavar="DIR", help="results of vllm-trimix probe, whose order num_layers follows")
    add("--server", metavar="URL", help="ask a running TRIMIX server, each prompt with and without opt-out")
    add("--served", metavar="NAME", help="the model's name on that server (default: the only one)")
    add("--chat-template", action="store_true", help="ask as a user's turn (default: the published base template)")
    add(
        "--max-answer-tokens",
        type=arguments.whole,
        metavar="N",
        help="room for each answer, on top of the length (default: the published ones within it)",
    )
    add("--prompts", type=Path, metavar="FILE", help="JSON lines of prompts, for agreement")
    add(
        "--documents",
        type=Path,
        nargs="+",
        action="extend",
        default=[],
        metavar="FILE",
        help="long texts whose continuations are compared, for agreement",
    )
    add(
        "--noise-floor",
        type=arguments.whole,
        metavar="TOKENS",
        help="ask stock a second time, in prompt chunks of so many tokens",
    )
    add("--text", type=Path, metavar="FILE", help="a long text, for ppl")
    add(
        "--concurrency",
        type=arguments.whole,
        default=1,
        metavar="N",
        help="prompts at the same time; times count at 1 only",
    )
    add("--seed", type=int, default=42, help="of the prompts (default: %(default)s)")
    arguments.add_output(parser, note=" (default: trimix-eval/SUITE)")
    arguments.add_tokenizer(parser)
    arguments.add_trust(parser, "model, here and in the engines")
    parser.set_defaults(run=run, parser=parser)


def run(args: argparse.Namespace) -> int:
    """Evaluates. Returns 1 if a prompt has no answer, or a configuration ran no sparse row; 130 after Ctrl-C.

    Raises:
        ValueError: Something the user got wrong.
        OSError: A file that can't be read or written.
    """
    arguments.check_packages(
        *("matplotlib", "scipy", "tqdm", "transformers", "openai" if args.server else "vllm"), extra="eval"
    )
    # Heavy: scipy and the suites' own packages.
    from vllm_trimix.demo import languages
    from vllm_trimix.evaluation import askers
    from vllm_trimix.evaluation.answers import Answers
    from vllm_trimix.evaluation.prompts import Prompts
    from vllm_trimix.evaluation.run import run as ask_all
    from vllm_trimix.evaluation.suite import Context
    from vllm_trimix.evaluation.suites.registry import SUITES

    suite = eval_choices.suite(args, SUITES)
    hf_model.share_trust(args)
    folder = args.output or Path("trimix-eval") / suite.name
    arguments.check_output(folder)
    about = {"kind": "evaluation", "suite": suite.name, "model": args.model, "engine flags": args.flags}
    answers = Answers(
        folder, {**about, "asked": args.server or "engine", "seed": args.seed, "chat": args.chat_template}
    )
    tokenizer = args.tokenizer or eval_choices.flag(args.flags, "--tokenizer")
    source = hf_model.describe(args.model, trust_remote_code=args.trust_remote_code, tokenizer=tokenizer)
    template = hf_model.template_arguments(args, source.tokenizer)
    language = languages.detect(source.tokenizer)
    context = Context(
        tokenizer=source.tokenizer,
        language=language,
        seed=args.seed,
        chat=args.chat_template,
        template_arguments=template,
        thought_end=eval_choices.thought_end(args, source.tokenizer, template),
        depths=eval_choices.depths(args.depths) or suite.depths,
        prompts=args.prompts,
        documents=tuple(args.documents),
        text=args.text,
    )
    tasks = eval_choices.tasks(args.tasks, suite, language)
    configurations = eval_choices.configurations(args, source, suite.entry)
    more = args.max_answer_tokens or 0
    wanted = [length + more for length in eval_choices.wanted_lengths(args.lengths, suite.lengths)]
    limit = engine_limit.find(args, source.config, wanted).less(more)
    lengths = eval_choices.lengths(args.lengths, suite.lengths, limit, args.model)
    samples = args.samples or suite.samples
    prompts = Prompts(tasks, context, lengths=lengths, count=samples, max_answer_tokens=args.max_answer_tokens)
    flags = [*args.flags, *(["--tokenizer", args.tokenizer] if args.tokenizer else [])]
    start: Any = functools.partial(askers.EngineAsker, model=args.model, flags=flags, max_model_len=max(lengths) + more)
    if args.server:
        start = functools.partial(askers.ServerAsker, url=args.server, model=args.served)
    settings = {
        "lengths": list(lengths),
        "samples": samples,
        "seed": args.seed,
        "language": language,
        "chat_template": args.chat_template,
        "chat_template_kwargs": chat_template.in_use(source.tokenizer, template) if args.chat_template else {},
        "max_answer_tokens": args.max_answer_tokens,
        "concurrency": args.concurrency,
        "asked": f"the server at {args.server}" if args.server else "one engine after the other",
    }
    for words in hf_model.template_words(source.tokenizer, template) if args.chat_template else []:
        _say(f"{words} (--chat-template-kwargs)")
    _say(f"{', '.join(tasks)} at {', '.join(map(str, lengths))} tokens, {samples} of each; making prompts")
    with hf_model.Bars("prompt") as bars:
        try:
            outcome = ask_all(
                configurations, prompts, answers, start=start, concurrency=args.concurrency, progress=bars.update
            )
        except KeyboardInterrupt:
            _say(f"stopped; the same command goes on where it was ({folder})")
            raise
        except EngineDied as died:
            print(*died.last_lines, sep="\n", file=sys.stderr)
            print(f"vllm-trimix: error: {died}", file=sys.stderr)
            return 1
    if not outcome.samples:
        reasons = "; ".join(dict.fromkeys(prompts.unavailable.values()))
        raise ValueError(f"none of {', '.join(tasks)} can be asked here: {reasons}")
    return _finish(args, folder, suite.name, settings, configurations, prompts, answers, outcome)


def _finish(
    args: argparse.Namespace,
    folder: Path,
    suite: str,
    settings: dict[str, Any],
    configurations: Sequence[Any],
    prompts: Any,
    answers: Any,
    outcome: Any,
) -> int:
    """Writes the results and says what they are."""
    # Heavy: scipy and the suites' own packages.
    from vllm_trimix.evaluation import cells, report
    from vllm_trimix.evaluation.outcome import Evaluation

    facts = answers.facts
    mine = [a for a in answers if outcome.samples.get(a.sample) == a.digest]
    resolved = {
        c.name: Resolved.model_validate(found["resolved"])
        if (found := facts.get(c.name) or {}).get("resolved")
        else None
        for c in configurations
    }
    results = cells.results(mine, resolved)
    scored = [answer for answer in mine if answer.error is None and answer.measure == "answer"]
    unfinished = sum(prompts.thought_end not in answer.text for answer in scored)
    stock = facts.get(configurations[0].name, {})
    evaluation = Evaluation(
        suite=suite,
        model=args.model,
        settings=settings,
        environment={key: stock[key] for key in ("hardware", "versions", "engine") if key in stock},
        configurations=configurations,
        facts=facts,
        results=results,
        answers=mine,
        samples=outcome.samples,
        unavailable=prompts.unavailable,
        notes=[*prompts.notes, *(_unfinished(unfinished) if prompts.thought_end else [])],
        failures=outcome.failures,
        command=hf_model.command(args, positional=("suite", "model")),
    )
    report.write(folder, evaluation)
    print("\n".join(report.console(evaluation)))
    print(f"report: {folder / 'report.md'}")
    idle = [
        result.configuration
        for result in results
        if result.sparse
        and "rows" in (found := facts.get(result.configuration) or {})
        and not (found["rows"].get("triangle") or found["rows"].get("dynamic"))
    ]
    for name in dict.fromkeys(idle):
        print(f"{name}: no row ran sparse; see vllm-trimix doctor", file=sys.stderr)
    return int(bool(evaluation.failed or evaluation.failures or idle))


def _unfinished(count: int) -> list[str]:
    return [f"{count} answers end inside of a thought and score 0: raise --max-answer-tokens"] if count else []
