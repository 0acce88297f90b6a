"""The samples of an evaluation, made cell by cell: all of them at once may not fit in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import NamedTuple

from vllm_trimix.evaluation.sample import Measure, Sample
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
        self,
        tasks: dict[str, MakeSamples],
        context: Context,
        *,
        lengths: tuple[int, ...],
        count: int,
        max_answer_tokens: int | None = None,
    ) -> None:
        """Makes nothing yet.

        Args:
            tasks: How each task's samples are made.
            context: What from.
            lengths: Nominal, ascending.
            count: Samples of each cell, and of each depth where that varies.
            max_answer_tokens: Of an answer, on top of the length, where the task allows fewer.
        """
        self._tasks, self._context, self._count = tasks, context, count
        self._lengths, self._max_answer_tokens = lengths, max_answer_tokens
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

    @property
    def thought_end(self) -> str:
        """What ends the thought that scored answers begin with; empty where they begin with none."""
        return self._context.thought_end

    @property
    def expected(self) -> int:
        """About how many samples a cell has."""
        return self._count * max(1, len(self._context.depths))

    def samples(self, cell: Cell, *, made: Callable[[int], None] | None = None) -> list[Sample]:
        """The samples of a cell, named apart; none where the task's data can't be had.

        Args:
            cell: Of ``cells``.
            made: Told how many there are so far.

        Raises:
            ValueError: The length leaves no room.
        """
        if cell in self._kept:
            return self._kept[cell]
        try:
            context = self._context if made is None else dataclasses.replace(self._context, made=made)
            found = self._tasks[cell.task](context, cell.length, self._count)
        except Unavailable as error:
            self.unavailable[cell.task] = str(error)
            return []
        for sample in found:
            if len(sample.prompt) + sample.max_tokens > cell.length:
                raise ValueError(
                    f"--lengths: {sample.name} has {len(sample.prompt)} prompt tokens and up to {sample.max_tokens} of "
                    f"the answer: more than {cell.length}"
                )
        samples = [self._asked(dataclasses.replace(sample, task=cell.task)) for sample in found]
        tokens = sum(len(sample.prompt) for sample in samples)
        if self._kept_tokens + tokens <= _KEPT_TOKENS:
            self._kept[cell] = samples
            self._kept_tokens += tokens
        return samples

    def _asked(self, sample: Sample) -> Sample:
        """With the room that the user gives answers, and for a thought before them."""
        if sample.measure == Measure.PERPLEXITY:
            return sample
        tokens = max(sample.max_tokens, self._max_answer_tokens or 0)
        thought_end = self._context.thought_end if sample.measure == Measure.ANSWER else ""
        return dataclasses.replace(sample, max_tokens=tokens, thought_end=thought_end)
