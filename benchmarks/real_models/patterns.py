"""Dynamic patterns on real attention: ``python -m benchmarks.real_models.patterns --output build/real-eval``.

For each model and length: a head file by ``vllm-trimix search``, the keys that each pattern reads, divergence on long
texts and the needle through real vLLM. ``--times`` measures the time to the first token instead and wants the machine
to itself. Stopped, or out of hours, the same command goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.real_models import evaluate, texts
from benchmarks.real_models.evaluate import Setting
from benchmarks.real_models.plan import GEMMA, MODELS, SMOLLM2, K, Model, Stage
from vllm_trimix.config.layers import format_layers, parse_layers
from vllm_trimix.evaluation.configurations import TRIMIX
from vllm_trimix.evaluation.passages import ANSWER_TOKENS
from vllm_trimix.measurement.intervals import MIN_SAMPLES
from vllm_trimix.patterns.a_shape import AShape
from vllm_trimix.patterns.registry import PATTERNS, describe
from vllm_trimix.searching.candidates import published

LENGTHS = {SMOLLM2.short: (8 * K,), GEMMA.short: (16 * K,)}
"""Tokens of prompt and answer, by model."""
SEARCH, DENSITY, TTFT = "search", "density", "ttft"
HEADS = "heads"
"""Each head's own pattern, by the search."""
SCALED = "-scaled"
"""Behind the name of a pattern whose published size was shrunk with the prompt, as the search's candidates are."""
TOGETHER = f"{TRIMIX}+"
"""Before the name of a pattern beside the triangle; alone it has all layers."""
ALONE = tuple(name for name in PATTERNS if name != "dense")
_SIZED = ("vertical_slash", "block_sparse")
CHUNK = 2048
"""Tokens of a chunk of a prompt, as vLLM's on a CPU."""
_CANDIDATE = 0.3
"""Seconds of a candidate of the search, or of density, on a layer at 2048 tokens."""
_ROOM = 256
"""Tokens below a length for what the search asks on top."""
_SERVERS = 2
"""Patterns that are timed at once, beside stock and the triangle: all servers are up, of 4 GB each."""
_SERVE_FLAGS = ("--dtype=float32", "--enforce-eager")
_DEPTHS = (0.0, 0.5)
"""Of the needle; at the end of a prompt every window holds it."""
_MEASURED_LAYERS = 10
"""Layers whose keys are counted, evenly spread: a layer takes a minute a passage."""


@dataclass(frozen=True)
class PatternStage(Stage):
    """A call that measures patterns.

    Attributes:
        entries: How many configurations come on top of the stage's own.
        takes: Seconds on one core, about, of what isn't ``vllm-trimix eval``.
    """

    entries: int = 0
    takes: float = 0

    @property
    def configurations(self) -> int:
        """Engines that the stage starts, about."""
        return super().configurations + self.entries

    def seconds(self, tasks: int) -> float:
        """What it takes on one core, about."""
        return self.takes or super().seconds(tasks)


def patterns(length: int) -> dict[str, dict[str, Any]]:
    """The patterns by name: at their published sizes, and those of a fixed size shrunk with the prompt as well."""
    found: dict[str, dict[str, Any]] = {name: {"pattern": name} for name in ALONE}
    for name in _SIZED:
        # The largest of a kind comes last.
        [*_, largest] = [pattern for pattern in published(length) if pattern.name == name]
        found[f"{name}{SCALED}"] = describe(largest)
    return found


def open_layers(model: Model, setting: Setting) -> tuple[int, ...]:
    """Layers with full attention that the model's triangle leaves dense."""
    triangle = parse_layers(setting.entry(model)["layers"], num_layers=max(model.layers) + 1)
    return tuple(layer for layer in model.layers if layer not in triangle)


def names(model: Model, length: int, setting: Setting) -> list[str]:
    """Configurations beside stock and the triangle; with the triangle only where it leaves layers dense.

    Published sizes cover prompts of these lengths: of those patterns the shrunk ones are asked.
    """
    alone = [name for name in (*patterns(length), HEADS) if name not in _SIZED]
    together = [name for name in alone if name != AShape.name and open_layers(model, setting)]
    return [f"{TOGETHER}{name}" for name in together] + alone


def needle_names(model: Model, length: int, setting: Setting) -> list[str]:
    """Those of ``names`` that the needle is asked under: beside the triangle where there are any, and ``a_shape``."""
    everything = names(model, length, setting)
    together = [name for name in everything if name.startswith(TOGETHER)]
    return [*together, AShape.name] if together else everything


def entry(name: str, model: Model, length: int, setting: Setting) -> dict[str, Any]:
    """The ``trimix`` entry of a configuration."""
    kind = name.removeprefix(TOGETHER)
    pattern = {"heads": str(head_file(model, length, setting))} if kind == HEADS else patterns(length)[kind]
    # Named, as layers with a window of their own never are any pattern's.
    layers = open_layers(model, setting) if name.startswith(TOGETHER) else model.layers
    base = setting.entry(model)
    return {
        **base,
        "layers": base["layers"] if name.startswith(TOGETHER) else [],
        "shallow": {**pattern, "min_seq_len": 0, "layers": format_layers(layers)},
    }


def head_file(model: Model, length: int, setting: Setting) -> Path:
    """What the search writes."""
    return setting.output / f"{model.short}-patterns-{SEARCH}-{length // K}k" / "heads.json"


def stages(setting: Setting) -> list[PatternStage]:
    """All of them, short prompts first; times come last.

    Raises:
        ValueError: A preset file names no layers.
    """
    found = []
    for model in MODELS:
        for length in LENGTHS[model.short]:
            found += _stages(model, length, setting)
    return sorted(found, key=lambda stage: stage.priority)


def _stages(model: Model, length: int, setting: Setting) -> list[PatternStage]:
    compared, prefill = names(model, length, setting), model.prefill[length]
    counted = len(measured_layers(model))
    step = 40 + LENGTHS[model.short].index(length)

    def stage(what: str, suite: str, samples: int, priority: int = step, **fields: Any) -> PatternStage:
        name = f"{model.short}-patterns-{what}-{length // K}k"
        return PatternStage(name, model, suite, length, priority, samples, folder=name, **fields)

    searched = _measuring(len(model.layers), length, len(published(length)))
    found = [
        stage(SEARCH, SEARCH, 1, tasks=(SEARCH,), takes=searched),
        stage("documents", "agreement", 2, noise_floor=True, answer=ANSWER_TOKENS, entries=len(compared)),
        stage(DENSITY, DENSITY, 1, tasks=(DENSITY,), takes=_measuring(counted, length, len(patterns(length)) + 1)),
        stage("niah", "niah", 1, depths=_DEPTHS, entries=len(needle_names(model, length, setting))),
    ]
    if length == max(LENGTHS[model.short]):
        for number, first in enumerate(range(0, len(compared), _SERVERS)):
            some = tuple(compared[first : first + _SERVERS])
            takes = (len(some) + 2) * (2 * model.start + (1 + MIN_SAMPLES) * prefill)
            found.append(stage(f"{TTFT}-{number}", TTFT, MIN_SAMPLES, step + 10, tasks=some, takes=takes))
    return found


def measured_layers(model: Model) -> tuple[int, ...]:
    """Those whose keys are counted."""
    return model.layers[:: -(-len(model.layers) // _MEASURED_LAYERS)]


def _measuring(layers: int, length: int, candidates: int) -> float:
    """Seconds of candidates on a prompt, about: attention grows with the square of the length."""
    return _CANDIDATE * candidates * layers * (length / (2 * K)) ** 2


def command(stage: Stage, tasks: Sequence[str], setting: Setting) -> list[str]:
    """The call of a stage, as ``evaluate.run`` takes it.

    Raises:
        ValueError: A preset file names no layers.
    """
    model, length = stage.model, stage.length
    path, output = str(setting.models / model.folder), str(setting.output / stage.folder)
    heads = head_file(model, length, setting)
    layers = ["--layers", format_layers(model.layers)]
    if stage.suite == SEARCH:
        sizes = ["--lengths", str(length - _ROOM), "--samples", str(stage.samples), "--chunk", str(CHUNK)]
        return ["search", path, *sizes, *layers, "--dtype", "float32", "--output", output]
    if stage.suite == DENSITY:
        words = ["benchmarks.real_models.density", path, "--length", str(length), "--samples", str(stage.samples)]
        words += ["--layers", format_layers(measured_layers(model)), "--chunk", str(CHUNK)]
        words += ["--heads", str(heads)] if heads.is_file() else []
        return [*words, "--documents", *map(str, texts.paths(setting.documents)), "--output", output]
    of_suite = needle_names if stage.suite == "niah" else names
    wanted = tasks if stage.suite == TTFT else of_suite(model, length, setting)
    more: list[str] = []
    for name in wanted:
        if not name.endswith(HEADS) or heads.is_file():
            more += ["--config", f"{name}={json.dumps(entry(name, model, length, setting))}"]
    if stage.suite == TTFT:
        words = ["benchmarks.benchmark_ttft", "--model", path, "--lengths", str(length - ANSWER_TOKENS)]
        words += ["--prompts", str(texts.paths(setting.documents)[0]), "--repeats", str(stage.samples)]
        words += ["--decode-tokens", "0", "--no-ideal", "--no-breakdown", "--output", output]
        words += [f"--serve-arg={flag}" for flag in _SERVE_FLAGS]
        return [*words, "--trimix", json.dumps(setting.entry(model)), *more]
    words = evaluate.command(stage, tasks, setting)
    end = words.index("--")
    return [*words[:end], *more, *words[end:]]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns 1 if a stage failed, 2 for a mistake of the user's, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_models.patterns", description=__doc__)
    evaluate.add_arguments(parser)
    parser.add_argument("--times", action="store_true", help="times to the first token, instead of all the others")
    args = parser.parse_args(argv)

    def find(setting: Setting) -> list[Stage]:
        there = [stage for stage in stages(setting) if (stage.suite == TTFT) is args.times]
        return evaluate.chosen(args.only, there)

    return evaluate.guarded(find, args, make=command)


if __name__ == "__main__":
    sys.exit(main())
