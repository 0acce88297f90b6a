"""What a stage and a program of stages are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

STAGE_LIMIT = 480.0


@dataclass(frozen=True)
class Stage:
    """One thing to find out, in a process of its own.

    Attributes:
        name: Names the result files.
        function: ``module:function``, called with a ``Report`` in the stage's process.
        seconds: What it takes on an H200, from ``Report.alone`` on where it prepares; a run with a budget starts it
            only if that much is left.
        summary: What it finds out, in a line.
        settings: What it runs on a GPU; results count only for the same settings.
        toy: What a rehearsal changes of them.
        group: Stages of a group share a folder, and never run side by side.
        use: ``alone``: nothing else runs. ``beside``: others that may run beside others do. ``prepared``: it starts
            beside others and has the device to itself from ``Report.alone`` on.
        limit: Seconds after which it is ended, from ``Report.alone`` on where it prepares; None: the run's own limit.
        prepare: Seconds after which it is ended if it has not called ``Report.alone``.
        device: Seconds that its kernels take on an H200, predicted; a rehearsal measures the others.
    """

    name: str
    function: str
    seconds: float
    summary: str
    settings: dict[str, Any] = field(default_factory=dict)
    toy: dict[str, Any] = field(default_factory=dict)
    group: str | None = None
    use: Literal["alone", "beside", "prepared"] = "alone"
    limit: float | None = None
    prepare: float = 0.0
    device: float = 0.0


@dataclass(frozen=True)
class Program:
    """Stages that one command runs.

    Attributes:
        script: The command's name, for messages.
        stages: In the order in which they start: the most valuable first. What time leaves out are the last ones,
            ``prepared`` stages excepted, whose time is kept free for them.
        budget: Seconds in all, unpacking included; None: no limit.
        summary: What it is, in a line.
    """

    script: str
    stages: Sequence[Stage]
    budget: float | None
    summary: str
