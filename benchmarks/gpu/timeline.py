"""How long a prepared run would take on a GPU, from what its rehearsal took outside kernels.

Imports, engine starts, references and reports take on a GPU's host about what they take here; kernels don't. So a
rehearsal's seconds outside kernels, and the seconds that each stage's kernels should need on an H200, are laid out as
the schedule would: side by side on the run's slots, then one after the other what has the device to itself. What a
rehearsal doesn't have, CUDA's own start, Triton's compiler, CUDA graphs, stands in ``Stage.device`` too.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu.stage import Stage

UNPACK_SECONDS = 15.0


def outside_kernels(result: Mapping[str, Any]) -> float:
    """Seconds of a stage that neither kernels nor waiting for the device took."""
    return float(max(0.0, result["seconds"] - result.get("device_seconds", 0.0)))


def projected_seconds(stages: Sequence[Stage], outside: Mapping[str, float], jobs: int) -> float:
    """Seconds of a run, unpacking included.

    Args:
        stages: In the order in which they start.
        outside: Seconds outside kernels by stage, of those that are to run.
        jobs: Stages side by side.
    """
    slots = [0.0] * jobs
    for stage in stages:
        if stage.name in outside:
            start = heapq.heappop(slots)
            beside = 0.0 if stage.use == "prepared" else stage.device
            heapq.heappush(slots, start + outside[stage.name] + beside)
    alone = sum(stage.device for stage in stages if stage.use == "prepared" and stage.name in outside)
    return UNPACK_SECONDS + max(slots) + alone
