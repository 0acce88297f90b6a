"""What fits into a box of seconds: every round of measurements once, in order of value, then again while they fit."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Round:
    """A round of measurements that can be repeated.

    Attributes:
        name: What it is called where it is left out.
        run: Measures once, given how often it has run before. Returns whether it may run again.
        seconds: What one takes; an estimate until the first has run, then the longest so far.
        most: How often it runs at most.
        done: How often it has run.
    """

    name: str
    run: Callable[[int], bool]
    seconds: float
    most: int = 1
    done: int = field(default=0, init=False)


def fill(rounds: Sequence[Round], box: float, *, clock: Callable[[], float] = time.monotonic) -> list[str]:
    """Runs the rounds.

    A round starts only where its seconds are left, so that a box is passed by no more than an estimate was wrong.

    Args:
        rounds: The most valuable first.
        box: Seconds.
        clock: Says what time it is, in seconds.

    Returns:
        Names of the rounds that did not run once.
    """
    end = clock() + box
    waiting = list(rounds)
    while waiting:
        ran = []
        for each in waiting:
            started = clock()
            if started + each.seconds > end:
                continue
            again = each.run(each.done)
            took = clock() - started
            each.seconds = took if each.done == 0 else max(each.seconds, took)
            each.done += 1
            if again and each.done < each.most:
                ran.append(each)
        # What did not fit now fits no better later.
        waiting = ran
    return [each.name for each in rounds if not each.done]
