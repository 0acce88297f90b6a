"""Evaluates the pretrained models, stage by stage: ``python -m benchmarks.real_models.evaluate --output DIR``.

Stages run one after the other, the most telling first, each a call of ``vllm-trimix eval``. Stopped, or out of hours,
the same command goes on where it was: no prompt is asked twice.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_models import calls, screening, texts
from benchmarks.real_models.plan import (
    CONCURRENCY,
    ENGINE_FLAGS,
    MODELS,
    NOISE_CHUNK,
    SHAPE,
    STAGES,
    Model,
    Rule,
    Stage,
)

PRESETS = Path(__file__).parent / "presets"
"""Layers that were found on a model, a file each."""
_READERS = ("agreement", "ppl", "density", "ttft")
"""Suites that read the texts."""


@dataclass(frozen=True)
class Setting:
    """Where things are, and which layers get the triangle.

    Attributes:
        output: Folder of all results.
        models: Folder of the models.
        documents: Folder of the texts.
        presets: Preset files by model folder, with the probe's ``scores.json`` beside them.
    """

    output: Path
    models: Path
    documents: Path
    presets: Mapping[str, Path]

    def entry(self, model: Model) -> dict[str, Any]:
        """The ``trimix`` entry of a model.

        Raises:
            ValueError: Its preset file names no layers.
        """
        return {"layers": self._layers(model), **SHAPE}

    def _layers(self, model: Model) -> Any:
        path = self._preset(model)
        if path is None:
            return model.chosen
        try:
            return json.loads(path.read_text())["layers"]
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"--preset: {path} names no layers; take a preset of vllm-trimix probe") from None

    def _preset(self, model: Model) -> Path | None:
        """The file that is given, or the one that comes with the checkout."""
        shipped = PRESETS / f"{model.folder}.json"
        return self.presets.get(model.folder, shipped if shipped.is_file() else None)

    def probe(self, model: Model) -> Path | None:
        """The folder with the layers' order, where there is one."""
        path = self._preset(model)
        return path.parent if path is not None and (path.parent / "scores.json").is_file() else None


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if a stage failed, 2 for a mistake of the user's, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models.evaluate", description=__doc__)
    add_arguments(parser)
    args = parser.parse_args(argv)
    return guarded(lambda setting: chosen(args.only), args)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Where things are, which stages, and for how long."""
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/real-eval"), metavar="DIR", help="default: %(default)s")
    add("--models", type=Path, default=Path("build/real-models"), metavar="DIR", help="default: %(default)s")
    add("--texts", type=Path, default=texts.FOLDER, metavar="DIR", help="default: %(default)s")
    preset = "triangle layers, of vllm-trimix probe (default: the checkout's)"
    add("--preset", action="append", default=[], metavar="MODEL=FILE", help=preset)
    add("--only", nargs="+", default=[], metavar="STAGE", help="names of stages, or what they begin with")
    add("--hours", type=float, metavar="H", help="stop after so long; the same command goes on")
    add("--list", action="store_true", help="print the stages, what is done, and about how long the rest takes")


def guarded(find: Callable[[Setting], Sequence[Stage]], args: argparse.Namespace, *, make: Make | None = None) -> int:
    """Lists or runs stages; mistakes and Ctrl-C end in a line and a status.

    Args:
        find: The stages, given where things are.
        args: Of ``add_arguments``.
        make: What a stage calls; None: ``command``.
    """
    try:
        setting = Setting(args.output, args.models, args.texts, _presets(args.preset))
        stages, make = find(setting), make or command
        if args.list:
            print("\n".join(listing(stages, setting, make=make)))
            return 0
        prepare(stages, setting)
        return run(stages, setting, seconds=None if args.hours is None else 3600 * args.hours, make=make)
    except (OSError, ValueError) as error:
        print(f"real-models: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("real-models: stopped; the same command goes on where it was", file=sys.stderr)
        return 130


def prepare(stages: Sequence[Stage], setting: Setting) -> None:
    """Sees to what the stages need: the texts are fetched, the models must be there.

    Raises:
        ValueError: A model or a text is missing.
        OSError: What can't be written.
    """
    for model in dict.fromkeys(stage.model.folder for stage in stages):
        if not (setting.models / model / "config.json").is_file():
            raise ValueError(
                f"{setting.models / model} is no model; run python -m benchmarks.real_models.fetch {model}"
            )
    if any(stage.suite in _READERS for stage in stages):
        texts.make(setting.documents)


def _presets(given: Sequence[str]) -> dict[str, Path]:
    known = [model.folder for model in MODELS]
    found = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or name not in known:
            raise ValueError(f"--preset: {text!r} is not MODEL=FILE; models are {', '.join(known)}")
        found[name] = Path(path)
    return found


def chosen(names: Sequence[str], there: Sequence[Stage] = STAGES) -> list[Stage]:
    """Stages in the order in which they run; all for no names.

    Raises:
        ValueError: A name that no stage begins with.
    """
    for name in names:
        if not any(stage.name.startswith(name) for stage in there):
            raise ValueError(f"--only: no stage begins with {name!r}; --list names them")
    wanted = [stage for stage in there if not names or any(stage.name.startswith(name) for name in names)]
    return sorted(wanted, key=lambda stage: stage.priority)


def command(stage: Stage, tasks: Sequence[str], setting: Setting) -> list[str]:
    """The call of ``vllm-trimix eval``, without the interpreter.

    Raises:
        ValueError: A preset file names no layers.
    """
    words = ["eval", stage.suite, str(setting.models / stage.model.folder), "--lengths", str(stage.length)]
    words += ["--samples", str(stage.samples), "--output", str(setting.output / stage.folder)]
    if tuple(tasks) != screening.all_tasks(stage.suite):
        words += ["--tasks", ",".join(tasks)]
    words += ["--depths", ",".join(f"{depth:g}" for depth in stage.depths)] if stage.depths else []
    entry = setting.entry(stage.model)
    words += ["--configs", "stock,trimix" if stage.trimix else "stock"]
    words += ["--trimix", json.dumps(entry)] if stage.trimix else []
    for name, layers in stage.sets:
        words += ["--config", f"{name}={json.dumps({**entry, 'layers': layers})}"]
    for ablation in stage.ablations:
        words += ["--ablation", ablation]
    probe = setting.probe(stage.model)
    if probe is not None and any(ablation.startswith("num_layers") for ablation in stage.ablations):
        words += ["--probe", str(probe)]
    words += ["--noise-floor", str(NOISE_CHUNK)] if stage.noise_floor else []
    if stage.suite == "agreement":
        words += ["--documents", *(str(path) for path in texts.paths(setting.documents))]
    if stage.suite == "ppl":
        words += ["--text", str(texts.paths(setting.documents)[0])]
    return [*words, "--concurrency", str(CONCURRENCY), "--", *ENGINE_FLAGS]


Make = Callable[[Stage, Sequence[str], Setting], list[str]]
"""The call of a stage, given its tasks: words for ``vllm-trimix``, or a module with dots in its name and its words."""


def listing(stages: Sequence[Stage], setting: Setting, *, make: Make = command) -> list[str]:
    """A line a stage, and the sum of what is left."""
    left, lines = 0.0, []
    for stage in stages:
        names = screening.tasks(stage, screening.scores(setting.output / stage.screening))
        seconds = stage.seconds(len(names))
        is_done = bool(names) and calls.is_done(setting.output, stage.name, make(stage, names, setting))
        left += seconds if names and not is_done else 0
        state = "done" if is_done else f"{seconds:.0f} s" if names else "no task is known to be solved"
        asked = ",".join(names) if stage.rule != Rule.NAMED else ",".join(stage.tasks) or "all tasks"
        lines.append(
            f"{stage.priority:>3} {stage.name:<26} {stage.samples:>3} prompts x {stage.configurations:>2} "
            f"configurations  {state:<8} {asked}"
        )
    return [*lines, f"left: {left:.0f} s on one core, about ({left / 3600:.1f} hours), tasks not known yet left out"]


def run(stages: Sequence[Stage], setting: Setting, *, seconds: float | None, make: Make = command) -> int:
    """Runs stages until all are done or the time is over.

    Args:
        stages: In their order.
        setting: Where.
        seconds: That there are; None for no end.
        make: What a stage calls.

    Returns:
        1 if the command failed in a stage, else 0.
    """
    end = None if seconds is None else time.monotonic() + seconds
    failed = []
    for stage in stages:
        names = screening.tasks(stage, screening.scores(setting.output / stage.screening))
        if not names:
            _say(f"{stage.name}: stock solves none of its tasks at shorter lengths, or they aren't screened yet")
            continue
        words = make(stage, names, setting)
        if calls.is_done(setting.output, stage.name, words):
            continue
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            _say(f"the time is over before {stage.name}; the same command goes on there")
            break
        _say(f"{stage.name}: {', '.join(names)}, about {stage.seconds(len(names)):.0f} s on one core")
        status = calls.call(setting.output, stage.name, words, seconds=left)
        if status is None:
            _say(f"the time is over in {stage.name}; the same command goes on there")
            break
        if status:
            failed.append(stage.name)
            _say(f"{stage.name}: the command ended with {status}: {calls.log(setting.output, stage.name)}")
    if failed:
        _say(f"not done: {', '.join(failed)}; the same command tries again")
    return int(bool(failed))


def _say(text: str) -> None:
    print(f"real-models: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
