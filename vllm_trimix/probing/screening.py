"""Which tasks a model does at all, densely: only those can show what a mask costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

ASKED = 4
_WRONG = 2
"""So many wrong answers end a task: it can no longer be solved."""


@dataclass(frozen=True)
class Screened:
    """A task, asked densely.

    Attributes:
        task: Its name.
        length: Of the prompts, in tokens.
        right: Answers every token of which was the likeliest.
        asked: Prompts; fewer than ``ASKED`` where the first ones were wrong.
    """

    task: str
    length: int
    right: int
    asked: int

    @property
    def solved(self) -> bool:
        """Whether it is right in all but one."""
        return self.asked - self.right < _WRONG

    @property
    def words(self) -> str:
        return f"{self.task} {self.right} of {self.asked} at {self.length} tokens"


def screen(task: str, length: int, ask: Sequence[Callable[[], bool]]) -> Screened:
    """Asks until the task is solved or can't be.

    Args:
        task: Its name.
        length: Of the prompts, in tokens.
        ask: Each asks one prompt densely and tells whether the answer was right.
    """
    right = asked = 0
    for one in ask:
        right += one()
        asked += 1
        if asked - right >= _WRONG:
            break
    return Screened(task, length, right, asked)
