"""Where a prefill step's time goes: linear layers, dense attention, triangle body, tail, plan, scheduler, other.

    python -m benchmarks.benchmark_breakdown --output DIR

Each configuration runs in a process of its own: a real engine, scheduler and model in one process, profiled over one
prompt at a time. ``linear`` is matrix products outside attention; ``tail`` the dense remainder of the triangle layers;
``plan`` all that TRIMIX adds to a step before the layers run (request tracking, the plan, the remainder's metadata).
What stock vLLM also builds, KV-cache writes, norms, sampling and an idle device are ``other``. A step that plans no
triangle rows (short prompts, the very last rows) splits no layer: it is dense attention throughout. Run it with the
machine to itself.
"""

from __future__ import annotations

if not __package__:
    # Started by its file.
    import as_module

    as_module.run(__file__)

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Generator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.breakdown.engine import ANSWER_TOKENS
from benchmarks.breakdown.report import REFUSED_FIX, plot, report
from benchmarks.environment import environment
from benchmarks.models import add_model_arguments, check_lengths, kv_cache_space, prepare_model, read_config
from benchmarks.serving.configurations import configurations
from vllm_trimix.config.resolve import resolve

ROOT = Path(__file__).parents[1]
DEFAULT_ENGINE_ARGS = ("--load-format=dummy", "--dtype=bfloat16")
QUICK_LENGTH = 8192
_LAST_LINES = 25


class BreakdownError(RuntimeError):
    """An engine that died; the message holds the end of its log."""


def run_breakdown(
    model: Path,
    lengths: list[int],
    configurations: dict[str, dict[str, Any] | None],
    output: Path,
    *,
    repeats: int = 3,
    engine_args: tuple[str, ...] = DEFAULT_ENGINE_ARGS,
    cpus: str = "0",
) -> list[dict[str, Any]]:
    """Profiles every configuration at every length; writes breakdown.json, .md and .png after every row.

    Args:
        model: The model's folder.
        lengths: Prompt tokens.
        configurations: The ``trimix`` entry by name; None is stock vLLM with the plugin not loaded.
        output: Folder for the results.
        repeats: Profiled requests of each configuration and length, each beside one that is not profiled.
        engine_args: Arguments of ``vllm serve``.
        cpus: Cores of the engine on CPU machines, e.g. ``0`` or ``0-3``.

    Returns:
        The rows of breakdown.json.

    Raises:
        ValueError: A length, a name or an entry that can't run; nothing was started.
        BreakdownError: An engine died; the rows before it are written.
    """
    _check(model, lengths, configurations, repeats=repeats, cpus=cpus)
    output.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {
        "environment": environment(),
        "settings": {
            "model": model.name,
            "configurations": configurations,
            "lengths": lengths,
            "repeats": repeats,
            "engine_args": list(engine_args),
            "cpus": cpus,
        },
        "rows": [],
    }
    space = kv_cache_space(model, max(lengths) + ANSWER_TOKENS, arguments=engine_args)
    with tqdm(total=len(lengths) * len(configurations), unit="row") as bar:
        for name, trimix in configurations.items():
            bar.set_description(name)
            job = {
                "config": name,
                "lengths": lengths,
                "repeats": repeats,
                "vocab_size": read_config(model)["vocab_size"],
                "stock": trimix is None,
                "engine_args": _engine_arguments(model, lengths, trimix, engine_args),
            }
            with contextlib.closing(_rows_of_child(job, output / f"{name}.log", cpus=cpus, space=space)) as found:
                for row in found:
                    result["rows"].append(row)
                    _write(result, output)
                    bar.update()
    rows: list[dict[str, Any]] = result["rows"]
    return rows


def _check(
    model: Path, lengths: list[int], configurations: dict[str, dict[str, Any] | None], *, repeats: int, cpus: str
) -> None:
    if repeats < 1:
        raise ValueError(f"--repeats: {repeats} measures nothing; the least is 1")
    _num_cpus(cpus)
    check_lengths(lengths, model, answer_tokens=ANSWER_TOKENS)
    entry = json.loads((model / "config.json").read_text()).get("trimix")
    for name, trimix in configurations.items():
        if not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"--config: {name!r} is not a name; use letters, digits, '.', '-' and '_'")
        if trimix is not None:
            try:
                resolve(trimix, model=str(model), num_layers=read_config(model)["num_hidden_layers"], model_entry=entry)
            except ValueError as error:
                raise ValueError(f"configuration {name!r}: {error}") from None


def _num_cpus(cpus: str) -> int:
    """How many cores ``0``, ``0-3`` or ``0,2`` are."""
    count = 0
    for item in cpus.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", item)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise ValueError(f"--cpus: {cpus!r} is not a list of cores; write e.g. 0, 0-3 or 0,2")
        count += int(match[2] or match[1]) - int(match[1]) + 1
    return count


def _engine_arguments(
    model: Path, lengths: list[int], trimix: dict[str, Any] | None, engine_args: tuple[str, ...]
) -> list[str]:
    arguments = [
        f"--model={model}",
        f"--max-model-len={max(lengths) + ANSWER_TOKENS}",
        "--skip-tokenizer-init",
        "--no-enable-prefix-caching",
        *engine_args,
    ]
    if trimix is not None:
        arguments += ["--attention-backend=TRIMIX", "--additional-config=" + json.dumps({"trimix": trimix})]
    return arguments


def _rows_of_child(
    job: dict[str, Any], log: Path, *, cpus: str, space: dict[str, str]
) -> Generator[dict[str, Any], None, None]:
    """Runs one configuration's engine, yielding its rows as they come; its log is kept if it fails."""
    env = {
        **os.environ,
        **space,
        # The engine's own thread is what a CPU profile sees, so that the scheduler and the model must share it.
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": cpus,
        "OMP_NUM_THREADS": str(_num_cpus(cpus)),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }
    if job["stock"]:
        # An allowlist that names no plugin: stock is stock.
        env["VLLM_PLUGINS"] = ""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.breakdown.engine"],
            # Closes when this process is gone, however it went; the child then ends its whole group.
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=file,
            env=env,
            text=True,
            start_new_session=True,
        )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        process.stdin.write(json.dumps(job) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            yield json.loads(line)
        if process.wait() != 0:
            end = "\n".join(log.read_text(errors="replace").splitlines()[-_LAST_LINES:])
            raise BreakdownError(
                f"configuration {job['config']!r}: its engine ended with status {process.returncode}; "
                f"its log is {log}, the end of it:\n{end}"
            )
        log.unlink()
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _write(result: dict[str, Any], output: Path) -> None:
    (output / "breakdown.json").write_text(json.dumps(result, indent=1) + "\n")
    (output / "breakdown.md").write_text(report(result))
    plot(result["rows"], output / "breakdown.png")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.benchmark_breakdown",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder for breakdown.json, .md and .png")
    add_model_arguments(parser)
    parser.add_argument("--lengths", default="4096,16384", help="prompt tokens (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="profiled requests of each (default: %(default)s)")
    parser.add_argument("--trimix", metavar="JSON", help="the trimix entry (default: the upper half of the layers)")
    parser.add_argument(
        "--config",
        action="append",
        default=[],
        metavar="NAME=JSON",
        help="one more configuration beside stock and trimix; may be repeated",
    )
    parser.add_argument(
        "--engine-args",
        default=shlex.join(DEFAULT_ENGINE_ARGS),
        metavar="'ARGS'",
        help="as `vllm serve` takes them, in one string (default: '%(default)s')",
    )
    parser.add_argument("--cpus", default="0", help="cores of the engine, on CPU machines (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help=f"one length ({QUICK_LENGTH}), one repeat, not compiled")
    return parser


def _configurations(args: argparse.Namespace, model: Path) -> dict[str, dict[str, Any] | None]:
    half = json.dumps({"starting_layer": read_config(model)["num_hidden_layers"] // 2})
    return {c.name: c.trimix for c in configurations(args.trimix or half, args.config, ideal=False)}


def _parse_lengths(text: str) -> list[int]:
    lengths = []
    for item in text.split(","):
        if not item.strip().isdecimal():
            raise ValueError(f"--lengths: {item!r} in {text!r} is not a number of tokens; write e.g. 4096,16384")
        lengths.append(int(item))
    return list(dict.fromkeys(lengths))


def main(argv: list[str] | None = None) -> int:
    """The exit status: 0, 1 when a row is refused or an engine died, 2 for bad input, 130 for Ctrl-C."""
    args = _parser().parse_args(argv)
    try:
        with tempfile.TemporaryDirectory() as scratch:
            lengths = [QUICK_LENGTH] if args.quick else _parse_lengths(args.lengths)
            model = prepare_model(args.model, args.shape, Path(scratch))
            rows = run_breakdown(
                model,
                lengths,
                _configurations(args, model),
                args.output,
                repeats=1 if args.quick else args.repeats,
                # Compiling two engines takes longer than all the rest of a quick run.
                engine_args=(*shlex.split(args.engine_args), *(["--enforce-eager"] if args.quick else [])),
                cpus=args.cpus,
            )
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BreakdownError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted; finished rows are in {args.output}", file=sys.stderr)
        return 130
    print((args.output / "breakdown.md").read_text())
    refused = [row for row in rows if row["status"] != "ok"]
    for row in refused:
        print(f"{row['config']} at {row['length']}: {row['status']}. {REFUSED_FIX}", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
