"""Worker processes that may die: a task's crash costs that task and nothing else.

An illegal address ends a CUDA context for good, and with it every later task of the process. A pool of the standard
library gives up all waiting tasks when one process dies. Here a process that died, hangs or can't go on is replaced.
"""

from __future__ import annotations

import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from typing import Any, Literal

_POLL_SECONDS = 0.1
_STOP_SECONDS = 2.0
_STARTS_IN_VAIN = 4

How = Literal["returned", "raised", "died", "hung", "cut", "left"]


@dataclass(frozen=True)
class Task:
    """One call in a worker; function and arguments must survive pickling."""

    name: str
    function: Callable[..., Any]
    arguments: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Ended:
    """How a task ended.

    Attributes:
        task: The task.
        how: ``returned``; ``raised`` an exception; its process ``died``; it ``hung`` past its limit; it was ``cut``
            because the time was up; or it was ``left`` and never began.
        value: What it returned.
        error: What it raised, ``Type: message``, or how its process ended.
        trace: The last lines of the traceback.
        seconds: From its start.
    """

    task: Task
    how: How
    value: Any = None
    error: str = ""
    trace: list[str] = field(default_factory=list)
    seconds: float = 0.0


@dataclass
class _Worker:
    process: Any
    pipe: Connection
    ready: bool = False
    task: Task | None = None
    since: float = 0.0


class Crew:
    """Processes that take tasks in order, each one at a time."""

    def __init__(self, size: int, *, prepare: Callable[[], None], sound: Callable[[], None]) -> None:
        """Starts the processes.

        Args:
            size: Processes.
            prepare: Called once in each, before any task.
            sound: Called in a process after a task has raised; if this raises too, the process is replaced.
        """
        self._prepare, self._sound = prepare, sound
        self._in_vain = 0
        self._workers = [self._start() for _ in range(size)]

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self._workers:
            if worker.task is None and worker.ready:
                _send(worker, None)
            else:
                worker.process.kill()
        for worker in self._workers:
            worker.process.join(_STOP_SECONDS)
            worker.process.kill()
            worker.process.join()

    def wait(self) -> None:
        """Waits until one process is prepared, so that what follows is counted as its work alone."""
        while not any(worker.ready for worker in self._workers):
            # No process has a task, so that none ends.
            list(self._listen())

    def run(
        self, tasks: Iterable[Task], *, limit: float, start_until: float | None = None, end_by: float | None = None
    ) -> Iterator[Ended]:
        """Yields each task as it ends, also those that there was no time for.

        Args:
            tasks: In the order in which they start.
            limit: Seconds that one may take.
            start_until: ``time.monotonic()`` from which on none starts.
            end_by: ``time.monotonic()`` at which those that still run are cut.
        """
        waiting = list(tasks)
        while waiting or any(worker.task for worker in self._workers):
            now = time.monotonic()
            if waiting and start_until is not None and now >= start_until:
                yield from (Ended(task, "left") for task in waiting)
                waiting = []
            for index, worker in enumerate(self._workers):
                if worker.task is not None and end_by is not None and now >= end_by:
                    yield from self._replace(index, "cut")
                elif worker.task is not None and now - worker.since > limit:
                    yield from self._replace(index, "hung")
                elif worker.ready and worker.task is None and waiting:
                    self._give(worker, waiting)
            yield from self._listen()

    def _listen(self) -> Iterator[Ended]:
        """Waits for a moment for what any process has to say; one that died is heard of too."""
        for pipe in wait([worker.pipe for worker in self._workers], _POLL_SECONDS):
            index = next(index for index, worker in enumerate(self._workers) if worker.pipe is pipe)
            yield from self._hear(index)

    def _start(self) -> _Worker:
        context = get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, self._prepare, self._sound), daemon=True)
        process.start()
        there.close()
        return _Worker(process, here)

    def _give(self, worker: _Worker, waiting: list[Task]) -> None:
        if _send(worker, waiting[0]):
            worker.task, worker.since = waiting.pop(0), time.monotonic()

    def _hear(self, index: int) -> Iterator[Ended]:
        worker = self._workers[index]
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            yield from self._replace(index, "died")
            return
        if message == "ready":
            worker.ready, self._in_vain = True, 0
            return
        how, value, error, trace, goes_on = message
        task, worker.task = worker.task, None
        assert task is not None
        yield Ended(task, how, value, error, trace, time.monotonic() - worker.since)
        if not goes_on:
            yield from self._replace(index, "died")

    def _replace(self, index: int, how: How) -> Iterator[Ended]:
        worker = self._workers[index]
        if how == "died":
            worker.process.join(_STOP_SECONDS)
        worker.process.kill()
        worker.process.join()
        worker.pipe.close()
        if not worker.ready:
            self._in_vain += 1
            if self._in_vain >= _STARTS_IN_VAIN:
                raise RuntimeError(f"{self._in_vain} processes died while they started, {_ending(worker)}; see the log")
        self._workers[index] = self._start()
        if worker.task is not None:
            seconds = time.monotonic() - worker.since
            error = f"its process died, {_ending(worker)}" if how == "died" else f"stopped after {seconds:.0f} s"
            yield Ended(worker.task, how, error=error, seconds=seconds)


def _send(worker: _Worker, task: Task | None) -> bool:
    try:
        worker.pipe.send(task)
    except OSError:
        # It died meanwhile, and is found dead in the next round.
        return False
    return True


def _ending(worker: _Worker) -> str:
    code = worker.process.exitcode
    return f"{signal.Signals(-code).name}" if code is not None and code < 0 else f"exit status {code}"


def _serve(pipe: Connection, prepare: Callable[[], None], sound: Callable[[], None]) -> None:
    prepare()
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        try:
            pipe.send(("returned", task.function(*task.arguments), "", [], True))
        except Exception as error:
            trace = traceback.format_exc().splitlines()[-6:]
            pipe.send(("raised", None, f"{type(error).__name__}: {error}", trace, _goes_on(sound)))


def _goes_on(sound: Callable[[], None]) -> bool:
    try:
        sound()
    except Exception:
        return False
    return True
