"""What a probe asks: prompts of which it knows the answer, or the model's own answers."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from vllm_trimix.probing import documents, prompts
from vllm_trimix.probing.gradient import Sample
from vllm_trimix.probing.screening import ASKED, Screened, screen
from vllm_trimix.probing.tasks import Task

Reference = Literal["answers", "own"]
OWN_TOKENS = 8
"""Tokens of the model's own answer that are compared."""


@dataclass(frozen=True)
class Material:
    """Where prompts come from: tasks, a file's prompts, or documents.

    Attributes:
        tokenizer: The model's.
        lengths: Of prompts, in tokens, ascending; those of a file have their own, and this is its longest.
        seed: Of all that is drawn.
        tasks: That can be asked.
        template_arguments: The user's, of the chat template.
        given: The file's prompts.
        documents: Text files.
        own: Whether the reference is the model's own answer, whatever it can do.
    """

    tokenizer: Any
    lengths: tuple[int, ...]
    seed: int
    tasks: tuple[Task, ...] = ()
    template_arguments: Mapping[str, Any] = field(default_factory=dict)
    given: Sequence[prompts.Prompt] = ()
    documents: Sequence[Path] = ()
    own: bool = False

    @property
    def most(self) -> int | None:
        """Held-out prompts that there are; None where as many are made as one likes."""
        return len(self.given) - len(self.given) // 2 if self.given else None

    def draw(self, what: str, length: int, count: int) -> list[Sample]:
        """Prompts for a purpose; none of one purpose is another's, and more begin with the same.

        Args:
            what: ``screened``, ``scored`` or ``held out``.
            length: In tokens; a file's prompts have their own.
            count: How many; a file may have fewer.
        """
        if self.given:
            of = [prompt.sample for index, prompt in enumerate(self.given) if (index % 4 < 2) == (what != "held out")]
            return of[:count]
        seed = f"{self.seed} {what}"
        if self.documents:
            # By turns, so that no piece serves two purposes as long as the texts last.
            found = documents.pieces(self.documents, self.tokenizer, length=length, count=2 * count, seed=self.seed)
            return [Sample(piece, ()) for piece in found[what == "held out" :: 2]]
        made = prompts.generate(
            self.tokenizer,
            self.tasks,
            length=length,
            count=count,
            seed=f"{seed} {length}",
            template_arguments=self.template_arguments,
        )
        return [prompt.sample for prompt in made]


@dataclass(frozen=True)
class Known:
    """What the model can be asked, after it was tried.

    Attributes:
        material: With the tasks that are kept.
        reference: Right answers, or the model's own.
        screened: What was tried.
        pass_seconds: Length -> seconds of a dense pass, where one was timed.
    """

    material: Material
    reference: Reference
    screened: tuple[Screened, ...]
    pass_seconds: dict[int, float]

    @property
    def words(self) -> str:
        """What is asked, and against what it is held."""
        if self.material.documents:
            what = f"pieces of {len(self.material.documents)} documents"
        elif self.material.given:
            what = f"{len(self.material.given)} prompts of a file"
        else:
            what = ", ".join(task.name for task in self.material.tasks)
        against = "right answers" if self.reference == "answers" else "the model's own dense answers"
        return f"{what}, held against {against}"


def find_out(
    material: Material,
    *,
    is_right: Callable[[str, Sample], bool],
    progress: Callable[[str, int, int], None],
    timed: Callable[[Mapping[int, float]], None] = lambda seconds: None,
) -> Known:
    """Asks the tasks densely, and keeps those that the model does at every length.

    Args:
        material: What can be asked.
        is_right: Asks a sample, under a name for what is saved.
        progress: Told the phase, and how much of it is done.
        timed: Told what passes take, length -> seconds, from the second one on.
    """
    seconds: dict[int, float] = {}
    found: list[Screened] = []

    def ask(task: str, length: int, index: int, sample: Sample) -> bool:
        if seconds and index:
            timed(seconds)
        start = time.perf_counter()
        right = is_right(f"screened {task} {length} {index}", sample)
        # The first pass of all is slower than any other.
        seconds[length] = min(seconds.get(length, float("inf")), time.perf_counter() - start)
        return right

    def tried(name: str, length: int, samples: Sequence[Sample]) -> Screened:
        asks = [
            lambda index=index, sample=sample: ask(name, length, index, sample) for index, sample in enumerate(samples)
        ]
        return screen(name, length, asks)

    if material.documents:
        return Known(material, "own", (), seconds)
    if material.given:
        samples = material.draw("screened", material.lengths[-1], ASKED)
        if material.own or not all(prompt.sample.answer for prompt in material.given):
            return Known(material, "own", (), seconds)
        found.append(tried("file", material.lengths[-1], samples))
        return Known(material, "answers" if found[0].solved else "own", tuple(found), seconds)
    if material.own:
        return Known(material, "own", (), seconds)
    kept = list(material.tasks)
    for at, length in enumerate(material.lengths):
        for index, task in enumerate(list(kept)):
            progress("tasks", at * len(material.tasks) + index, len(material.lengths) * len(material.tasks))
            one = replace(material, tasks=(task,))
            # A task that is done at one length is asked only half as often at the next.
            result = tried(task.name, length, one.draw("screened", length, ASKED if at == 0 else ASKED // 2))
            found.append(result)
            if not result.solved:
                kept.remove(task)
    if not kept:
        return Known(material, "own", tuple(found), seconds)
    return Known(replace(material, tasks=tuple(kept)), "answers", tuple(found), seconds)
