"""What a situation's launches come to, in plain types: the functions that the process with Triton's compiler runs."""

from __future__ import annotations

from typing import Any

from tests.launches import limits
from tests.launches.launch import Launch
from tests.launches.recorder import Recording, recording
from tests.launches.situations import Layer, Situation

_LAUNCHES: dict[str, Launch] = {}
"""One launch of every kernel that was recorded, by its key."""


def record(situation: Situation) -> tuple[Layer, Recording, Recording]:
    """A layer, what its warm-up launches, and what one step of it does."""
    with recording(situation.capability) as warm:
        layer = Layer(situation)
        layer.warm_up()
    with recording(situation.capability) as served:
        layer.step()
    return layer, warm, served


def examine(situation: Situation) -> dict[str, Any]:
    """Everything wrong with a situation, and the figures of it."""
    return judge(situation, *record(situation))


def judge(situation: Situation, layer: Layer, warm: Recording, served: Recording) -> dict[str, Any]:
    """Everything wrong with what was recorded, and its figures."""
    problems = [line for launch in (*warm.launches, *served.launches) for line in limits.problems(launch)]
    compiled = {launch.key for launch in warm.launches}
    problems += [f"{launch.kernel}: compiled while serving" for launch in served.launches if launch.key not in compiled]
    if served.streams:
        problems.append(f"{served.streams} streams beside the step's own were entered")
    problems += [f"{place} copies from the host" for place in served.copies]
    if served.order[: len(served.uploads)] != ["upload"] * len(served.uploads) or len(served.uploads) > 1:
        problems.append(f"more than one upload, or one after a launch: {served.order[:4]}")
    if not situation.pattern:
        problems += limits.uncovered(served.launches, [*layer.plan.triangle, *layer.plan.tails])
        split = any(launch.kernel == "merge_partials_kernel" for launch in served.launches)
        expected = ["triangle_prefill_kernel", *(["merge_partials_kernel"] if split else [])]
        if (found := [launch.kernel for launch in served.launches]) != expected:
            problems.append(f"a layer launches {found}; expected {expected}")
    _LAUNCHES.update((launch.key, launch) for launch in served.launches)
    return {
        "problems": sorted(set(problems)),
        "launches": len(served.launches),
        "keys": sorted({launch.key for launch in served.launches}),
        "programs": max(launch.grid[0] for launch in served.launches),
        "largest": max(map(limits.largest_number, served.launches)),
        "uploaded": sum(served.uploads),
    }


def compile_kernel(key: str) -> dict[str, Any]:
    """Resources of a kernel that some situation launches, compiled as Triton would at its launch."""
    from vllm_trimix.kernels.triton_compile import _inspect

    launch = _LAUNCHES[key]
    assert launch.source is not None
    compiled = launch.source()
    usage, _ = _inspect(compiled.asm["cubin"])
    report = {
        "kernel": launch.kernel,
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "num_warps": launch.num_warps,
    }
    capability = int(key.split(" sm_")[1].split()[0])
    return {**report, "capability": capability, "problems": limits.unfit(report, capability=capability)}
