"""Signals that end a command: exceptions while it has an engine to end, held off while it ends it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any

# Sent by a service manager or a batch system, and by a terminal that closes.
_SIGNALS = (signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """A signal came that ends the command, as Ctrl-C does.

    Attributes:
        number: The signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


def raise_on_signals() -> dict[signal.Signals, Any]:
    """Makes the signals exceptions where they would end this process at once; what ``restore`` takes.

    Only the main thread may; elsewhere nothing changes.
    """
    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):
        for number in _SIGNALS:
            # One that is ignored, as under nohup, stays so.
            if signal.getsignal(number) == signal.SIG_DFL:
                before[number] = signal.signal(number, _raise)
    return before


def restore(before: Mapping[signal.Signals, Any]) -> None:
    """Ends what ``raise_on_signals`` began."""
    with contextlib.suppress(ValueError):
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def held_off() -> Iterator[None]:
    """Ignores Ctrl-C and the signals. Only the main thread may; elsewhere they are never delivered."""
    before: dict[signal.Signals, Any] = {}
    with contextlib.suppress(ValueError):
        for number in (signal.SIGINT, *_SIGNALS):
            before[number] = signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        restore(before)


def _raise(number: int, _: FrameType | None) -> None:
    raise Stopped(number)
