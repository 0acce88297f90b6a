"""What the pretrained models are asked: the stages of the evaluation as data, the most telling ones first.

A stage is one call of ``vllm-trimix eval``. Screening asks stock alone a few prompts of every task; a task goes on to
the stages that carry a claim, and to longer prompts, only where stock solves it often enough.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from vllm_trimix.config.layers import format_layers
from vllm_trimix.evaluation.suites.niah import DEPTHS

ENGINE_FLAGS = ("--dtype", "float32", "--enforce-eager")
"""CPUs of this kind compute twice as fast in fp32 as in bf16, and compiling takes a minute an engine."""
CONCURRENCY = 8
"""Prompts at a time: so many answers' tokens cost little more than one's."""
SHAPE = {"n_init": 8, "n_local": 512, "last_n": 128, "min_prompt_len": 0}
"""The published triangle, at every length."""
SCREENED, SOLVED = 10, 0.2
"""Prompts of a screening, and the mean score of stock from which on a task at a length is worth more."""
CLAIMED = 50
"""Prompts of a cell that carries a claim."""
NOISE_CHUNK = 512
"""Tokens of a chunk of the other stock run: how far rounding alone carries answers apart."""
K = 1024


@dataclass(frozen=True)
class Model:
    """A model and what its work takes here.

    Attributes:
        folder: Of ``benchmarks/real_models/pinned.py``.
        short: What names of stages and folders begin with.
        layers: Those that can be triangle layers, ascending.
        chosen: Triangle layers where no preset file names any.
        prefill: Seconds of a prompt by its tokens, on one core.
        token: Seconds of an answer's token, ``CONCURRENCY`` answers at a time.
        start: Seconds until an engine answers.
    """

    folder: str
    short: str
    layers: tuple[int, ...]
    chosen: str
    prefill: dict[int, float]
    token: float
    start: float


SMOLLM2 = Model("smollm2-135m", "smollm2", tuple(range(30)), "22-29", {2 * K: 4.4, 4 * K: 11, 8 * K: 32}, 0.006, 25)
# Each of its tokens multiplies with an embedding of 262,144 words.
GEMMA = Model("gemma3-270m", "gemma", (5, 11, 17), "5,11,17", {4 * K: 9, 8 * K: 20, 16 * K: 50, 32 * K: 150}, 0.02, 35)
MODELS = (SMOLLM2, GEMMA)


class Rule(StrEnum):
    """Which of a suite's tasks a stage asks."""

    SCREEN = "screen"
    """Those that stock solved at every shorter length, by stock alone."""
    SOLVED = "solved"
    """Those that stock solved at this length's screening."""
    NAMED = "named"
    """Those that the stage names; all if it names none."""


@dataclass(frozen=True)
class Stage:
    """One call of ``vllm-trimix eval``.

    Attributes:
        name: Of the stage.
        model: Who is asked.
        suite: Of the command.
        length: Tokens of prompt and answer.
        priority: Stages run in ascending order.
        samples: Prompts of each task, and of each depth.
        rule: Which tasks.
        tasks: Names of tasks, in order of preference for ``most``.
        most: At most so many tasks.
        trimix: Whether the triangle is asked, besides stock.
        noise_floor: Whether stock is asked a second time, in other chunks.
        ablations: As ``--ablation`` takes them.
        sets: Names and layers of more triangles.
        folder: Where answers go; stages of a folder share those of stock.
        depths: Of the needle; the command's eleven without any.
        answer: Tokens of an answer, about, for the estimate.
    """

    name: str
    model: Model
    suite: str
    length: int
    priority: int
    samples: int
    rule: Rule = Rule.NAMED
    tasks: tuple[str, ...] = ()
    most: int | None = None
    trimix: bool = True
    noise_floor: bool = False
    ablations: tuple[str, ...] = ()
    sets: tuple[tuple[str, str], ...] = ()
    folder: str = ""
    depths: tuple[float, ...] = ()
    answer: int = 100

    @property
    def screening(self) -> str:
        """The folder where stock was asked which tasks it solves."""
        return f"{self.model.short}-{self.suite}"

    @property
    def prompts(self) -> int:
        """Of each task."""
        return self.samples * (len(self.depths or DEPTHS) if self.suite == "niah" else 1)

    @property
    def configurations(self) -> int:
        """Engines that the stage starts, about."""
        values = [len(ablation.partition("=")[2].split(",")) for ablation in self.ablations]
        return 1 + self.trimix + self.noise_floor + sum(values) + len(self.sets)

    def seconds(self, tasks: int) -> float:
        """What it takes on one core, about.

        Args:
            tasks: How many tasks it asks.
        """
        each = self.model.prefill[self.length] + self.answer * self.model.token
        return self.configurations * (self.model.start + tasks * self.prompts * each)


# Of one kind each first: where all of them can't be asked, these are.
_PREFERRED = ("niah_multikey_1", "cwe", "niah_multivalue", "fwe", "niah_single_3", "passkey", "number_string")
_FEW_DEPTHS = (0.0, 0.2, 0.4, 0.6, 0.8, 1.0)


_SUITES = ("ruler", "retrieval")


def _screens(
    model: Model, length: int, priority: int, *, suites: tuple[str, ...] = _SUITES, most: int | None = None
) -> list[Stage]:
    return [
        Stage(
            f"{model.short}-screen-{suite}-{length // K}k",
            *(model, suite, length, priority, SCREENED, Rule.SCREEN),
            tasks=_PREFERRED,
            most=most,
            trimix=False,
            folder=f"{model.short}-{suite}",
        )
        for suite in suites
    ]


def _claims(
    model: Model, length: int, priority: int, *, suites: tuple[str, ...] = _SUITES, most: int | None = None
) -> list[Stage]:
    return [
        Stage(
            f"{model.short}-{suite}-{length // K}k",
            *(model, suite, length, priority, CLAIMED, Rule.SOLVED),
            tasks=_PREFERRED,
            most=most,
            folder=f"{model.short}-{suite}",
        )
        for suite in suites
    ]


def _needle(model: Model, length: int, priority: int, samples: int, depths: tuple[float, ...] = ()) -> Stage:
    return Stage(
        f"{model.short}-niah-{length // K}k",
        *(model, "niah", length, priority, samples),
        folder=f"{model.short}-niah",
        depths=depths,
    )


def _text(model: Model, suite: str, length: int, priority: int, samples: int, answer: int) -> Stage:
    return Stage(
        f"{model.short}-{suite}-{length // K}k",
        *(model, suite, length, priority, samples),
        noise_floor=True,
        folder=f"{model.short}-{suite}",
        answer=answer,
    )


def _documents(model: Model, length: int, priority: int, samples: int) -> Stage:
    name = f"{model.short}-documents"
    return replace(_text(model, "agreement", length, priority, samples, 64), name=f"{name}-{length // K}k", folder=name)


def random_sets(model: Model, counts: tuple[int, ...], each: int) -> tuple[tuple[str, str], ...]:
    """Sets of so many layers that can be triangle layers, drawn once and for all, by name."""
    rng = random.Random(0)
    return tuple(
        (f"random-{count}-{number}", format_layers(tuple(sorted(rng.sample(model.layers, count)))))
        for count in counts
        for number in range(each)
    )


# Without the base's values.
_LAST_N = "last_n=0,1,4,16,64,256,512"
_N_LOCAL = "n_local=64,128,256,1024"
_SHAPES = "shape=last_rows,window"  # An A-shape is last_n=0.
_RANDOM = "random_layers=0,1,2"
_COUNTS = (4, 8, 12, 16, 20, 25, 30)
_GEMMA_SETS = tuple((f"layers-{layers.replace(',', '-')}", layers) for layers in ("5", "11", "17", "5,11", "11,17"))


def _ablation(name: str, model: Model, suite: str, priority: int, samples: int, **fields: Any) -> Stage:
    length = min(model.prefill)
    stage = Stage(f"{model.short}-{name}", model, suite, length, priority, samples, folder=f"{model.short}-{name}")
    return replace(stage, **fields)


STAGES: tuple[Stage, ...] = (
    *_screens(SMOLLM2, 2 * K, 10),
    *_screens(GEMMA, 4 * K, 10),
    _documents(SMOLLM2, 2 * K, 11, 20),
    _documents(GEMMA, 4 * K, 11, 10),
    _needle(SMOLLM2, 2 * K, 12, 5),
    *_claims(SMOLLM2, 2 * K, 13, most=4),
    _ablation(
        "layers",
        *(SMOLLM2, "agreement", 14, 6),
        ablations=("num_layers=" + ",".join(map(str, _COUNTS)),),
        sets=random_sets(SMOLLM2, (4, 8, 16, 25), 2),
        noise_floor=True,
        answer=64,
    ),
    _ablation(
        "shape",
        *(SMOLLM2, "agreement", 14, 6),
        ablations=(_LAST_N, _N_LOCAL, _SHAPES, _RANDOM),
        noise_floor=True,
        answer=64,
    ),
    _needle(GEMMA, 4 * K, 15, 2),
    *_claims(GEMMA, 4 * K, 29, suites=("ruler",), most=1),
    _ablation(
        "shape",
        *(GEMMA, "agreement", 16, 4),
        ablations=("last_n=0,16", "n_local=64,1024", "shape=last_rows"),
        sets=_GEMMA_SETS,
        noise_floor=True,
        answer=64,
    ),
    _ablation(
        "needle-ablation",
        *(SMOLLM2, "niah", 17, 1),
        ablations=(
            "num_layers=12,18,24,30",
            "last_n=0,1,16",
            "n_local=64",
            "shape=last_rows",
            "random_layers=0,1",
        ),
        depths=_FEW_DEPTHS,
    ),
    _ablation(
        "needle-ablation",
        *(GEMMA, "niah", 17, 1),
        ablations=("last_n=0,16", "shape=last_rows"),
        sets=_GEMMA_SETS,
        depths=_FEW_DEPTHS,
    ),
    _text(SMOLLM2, "long", 2 * K, 18, 8, 512),
    _text(SMOLLM2, "ppl", 2 * K, 18, 10, 1),
    _text(GEMMA, "ppl", 4 * K, 18, 10, 1),
    *_screens(SMOLLM2, 4 * K, 20, suites=("ruler",), most=1),
    _documents(SMOLLM2, 4 * K, 20, 8),
    _needle(SMOLLM2, 4 * K, 21, 1),
    *_claims(SMOLLM2, 4 * K, 22, suites=("ruler",), most=1),
    _documents(SMOLLM2, 8 * K, 24, 4),
    _documents(GEMMA, 8 * K, 28, 4),
    _needle(SMOLLM2, 8 * K, 25, 1, _FEW_DEPTHS),
    _text(SMOLLM2, "ppl", 8 * K, 33, 3, 1),
    _documents(GEMMA, 16 * K, 26, 4),
    _needle(GEMMA, 16 * K, 27, 1, _FEW_DEPTHS),
    _documents(GEMMA, 32 * K, 30, 1),
    _needle(GEMMA, 32 * K, 31, 1, (0.0, 0.5)),
)
