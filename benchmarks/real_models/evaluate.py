"""Evaluates the pretrained models, stage by stage: ``python -m benchmarks.real_models.evaluate --output DIR``.

Stages run one after the other, the most telling first, each a call of ``vllm-trimix eval``. Stopped, or out of hours,
the same command goes on where it was: no prompt is asked twice.
"""

from __future__ import annotations

import argparse
import json
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_models import screening, texts
from benchmarks.real_models.plan import ENGINE_FLAGS, MODELS, NOISE_CHUNK, SHAPE, STAGES, Model, Rule, Stage

PRESETS = Path(__file__).parent / "presets"
"""Layers that were found on a model, a file each."""
_READERS = ("agreement", "ppl")
"""Suites that read the texts."""
_STOP_SECONDS = 120
"""Until a stopped evaluation must have ended its engine."""


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
    add = parser.add_argument
    add("--output", type=Path, default=Path("build/real-eval"), metavar="DIR", help="default: %(default)s")
    add("--models", type=Path, default=Path("build/real-models"), metavar="DIR", help="default: %(default)s")
    add("--texts", type=Path, default=texts.FOLDER, metavar="DIR", help="default: %(default)s")
    add(
        "--preset",
        action="append",
        default=[],
        metavar="MODEL=FILE",
        help="triangle layers, of vllm-trimix probe (default: the checkout's)",
    )
    add("--only", nargs="+", default=[], metavar="STAGE", help="names of stages, or what they begin with")
    add("--hours", type=float, metavar="H", help="stop after so long; the same command goes on")
    add("--list", action="store_true", help="print the stages, what is done, and about how long the rest takes")
    args = parser.parse_args(argv)
    try:
        setting = Setting(args.output, args.models, args.texts, _presets(args.preset))
        stages = chosen(args.only)
        if args.list:
            print("\n".join(listing(stages, setting)))
            return 0
        prepare(stages, setting)
        return run(stages, setting, seconds=None if args.hours is None else 3600 * args.hours)
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


def chosen(names: Sequence[str]) -> list[Stage]:
    """Stages in the order in which they run; all for no names.

    Raises:
        ValueError: A name that no stage begins with.
    """
    for name in names:
        if not any(stage.name.startswith(name) for stage in STAGES):
            raise ValueError(f"--only: no stage begins with {name!r}; --list names them")
    wanted = [stage for stage in STAGES if not names or any(stage.name.startswith(name) for name in names)]
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
    return [*words, "--", *ENGINE_FLAGS]


def listing(stages: Sequence[Stage], setting: Setting) -> list[str]:
    """A line a stage, and the sum of what is left."""
    left, lines = 0.0, []
    for stage in stages:
        names = screening.tasks(stage, screening.scores(setting.output / stage.screening))
        seconds = stage.seconds(len(names))
        is_done = bool(names) and _is_done(setting, stage, command(stage, names, setting))
        left += seconds if names and not is_done else 0
        state = "done" if is_done else f"{seconds:.0f} s" if names else "no task is known to be solved"
        asked = ",".join(names) if stage.rule != Rule.NAMED else ",".join(stage.tasks) or "all tasks"
        lines.append(
            f"{stage.priority:>3} {stage.name:<26} {stage.samples:>3} prompts x {stage.configurations:>2} "
            f"configurations  {state:<8} {asked}"
        )
    return [*lines, f"left: {left:.0f} s on one core, about ({left / 3600:.1f} hours), tasks not known yet left out"]


def run(stages: Sequence[Stage], setting: Setting, *, seconds: float | None) -> int:
    """Runs stages until all are done or the time is over.

    Args:
        stages: In their order.
        setting: Where.
        seconds: That there are; None for no end.

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
        words = command(stage, names, setting)
        if _is_done(setting, stage, words):
            continue
        left = None if end is None else end - time.monotonic()
        if left is not None and left <= 0:
            _say(f"the time is over before {stage.name}; the same command goes on there")
            break
        _say(f"{stage.name}: {', '.join(names)}, about {stage.seconds(len(names)):.0f} s on one core")
        status = _evaluate(stage, words, setting, left)
        if status is None:
            _say(f"the time is over in {stage.name}; the same command goes on there")
            break
        if status == 0:
            _mark(setting, stage).write_text(json.dumps(words) + "\n")
        else:
            failed.append(stage.name)
            _say(f"{stage.name}: the command ended with {status}: {_log(setting, stage)}")
    if failed:
        _say(f"not done: {', '.join(failed)}; the same command tries again")
    return int(bool(failed))


def _evaluate(stage: Stage, words: Sequence[str], setting: Setting, seconds: float | None) -> int | None:
    """The command's exit status; None where the time was over first."""
    log = _log(setting, stage)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"{shlex.join(words)}\n")
        file.flush()
        child = subprocess.Popen(
            [sys.executable, "-m", "vllm_trimix.cli.main", *words],
            stdout=file,
            stderr=subprocess.STDOUT,
            # Ctrl-C is passed on below, once.
            start_new_session=True,
        )
        try:
            return child.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            _stop(child)


def _stop(child: subprocess.Popen[bytes]) -> None:
    """Ends the command as Ctrl-C does, so that it ends its engine and keeps what was said."""
    if child.poll() is not None:
        return
    child.send_signal(signal.SIGINT)
    try:
        child.wait(_STOP_SECONDS)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def _log(setting: Setting, stage: Stage) -> Path:
    return setting.output / "logs" / f"{stage.name}.log"


def _mark(setting: Setting, stage: Stage) -> Path:
    """Holds the command of a stage that is done; a file a stage, so that two may run side by side."""
    return setting.output / "logs" / f"{stage.name}.done"


def _is_done(setting: Setting, stage: Stage, words: list[str]) -> bool:
    path = _mark(setting, stage)
    return path.exists() and path.read_text() == json.dumps(words) + "\n"


def _say(text: str) -> None:
    print(f"real-models: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
