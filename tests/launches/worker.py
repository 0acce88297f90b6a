"""What runs in the process with Triton's compiler; nothing here imports Triton or vLLM before it is called."""

from __future__ import annotations

from typing import Any

from tests.launches.situations import Situation


def examine(situation: Situation) -> dict[str, Any]:
    """Everything wrong with a situation, and the figures of it."""
    from tests.launches import findings

    return findings.examine(situation)


def examine_again(situation: Situation) -> dict[str, Any]:
    """The same of a step like one before it."""
    from tests.launches import findings, recorder

    layer, warm, first = findings.record(situation)
    with recorder.recording(situation.capability) as second:
        layer.step()
    found = findings.judge(situation, layer, warm, second)
    return {**found, "first": first.copies, "second": second.copies}


def compile_kernels(situation: Situation) -> list[dict[str, Any]]:
    """Resources of every kernel that a situation launches."""
    from tests.launches import findings

    return [findings.compile_kernel(key) for key in findings.examine(situation)["keys"]]


def seen(defect: str) -> str:
    """What is said of a defect."""
    from tests.launches import defects

    return defects.seen(defect)


def defects() -> dict[str, str]:
    """What must be said of each defect."""
    from tests.launches.defects import DEFECTS

    return {name: line for name, (_, _, line) in DEFECTS.items()}
