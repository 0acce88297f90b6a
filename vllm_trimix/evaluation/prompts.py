"""The samples of an evaluation, made cell by cell: all of them at once may not fit in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

from vllm_trimix.evaluation.sample import Sample
from vllm_trimix.evaluation.suite import Context, MakeSamples, Unavailable

_KEPT_TOKENS = 4_000_000


class Cell(NamedTuple):
    """A task at a length."""

    task: str
    length: int


class Prompts:
    """The samples of each cell, the same whenever they are asked for.

    Attributes:
        unavailable: Why a task has no samples, by task.
    """

    def __init__(
        self, tasks: dict[str, MakeSamples], context: Context, *, lengths: tuple[int, ...], count: int
    ) -> None:
        """Makes nothing yet.

        Args:
            tasks: How each task's samples are made.
            context: What from.
            lengths: Nominal, ascending.
            count: Samples of each cell, and of each depth where that varies.
        """
        self._tasks, self._context, self._count = tasks, context, count
        self._lengths = lengths
        self._kept: dict[Cell, list[Sample]] = {}
        self._kept_tokens = 0
        self.unavailable: dict[str, str] = {}

    @property
    def notes(self) -> list[str]:
        """What the suite has to say of them."""
        return self._context.notes

    def cells(self) -> Iterator[Cell]:
        """Short prompts first: what is wrong shows early."""
        for length in self._lengths:
            for task in self._tasks:
                if task not in self.unavailable:
                    yield Cell(task, length)

    def samples(self, cell: Cell) -> list[Sample]:
        """The samples of a cell, named apart; none where the task's data can't be had.

        Raises:
            ValueError: The length leaves no room.
        """
        if cell in self._kept:
            return self._kept[cell]
        try:
            made = self._tasks[cell.task](self._context, cell.length, self._count)
        except Unavailable as error:
            self.unavailable[cell.task] = str(error)
            return []
        for sample in made:
            if len(sample.prompt) + sample.max_tokens > cell.length:
                raise ValueError(
                    f"--lengths: {sample.name} has {len(sample.prompt)} prompt tokens and up to {sample.max_tokens} of "
                    f"the answer: more than {cell.length}"
                )
        samples = [dataclasses.replace(sample, task=cell.task) for sample in made]
        tokens = sum(len(sample.prompt) for sample in samples)
        if self._kept_tokens + tokens <= _KEPT_TOKENS:
            self._kept[cell] = samples
            self._kept_tokens += tokens
        return samples
