"""After kernel cases have failed: the steps that tell why, side by side, and one line that a person can act on."""

from __future__ import annotations

import time
from typing import Any

from benchmarks.gpu.case_steps import step, steps_of
from benchmarks.gpu.crew import Crew, Task
from benchmarks.gpu.kernel_cases import kernel_of, size_of

MOST_CASES = 3
# Beyond the box, for what is being compiled when it is used up.
_GRACE = 5.0


def smallest(failed: dict[str, Any]) -> list[str]:
    """Names of the cases to follow, the smallest first, each kernel's smallest before any other's second."""
    names = sorted(failed, key=lambda name: size_of(failed[name]))
    first = {kernel_of(failed[name]): name for name in reversed(names)}
    return [*(name for name in names if name in first.values()), *(n for n in names if n not in first.values())][
        :MOST_CASES
    ]


def triage_cases(
    crew: Crew, device: str, cases: dict[str, Any], errors: dict[str, str], *, box: float
) -> list[dict[str, Any]]:
    """Finds out why cases fail.

    Args:
        crew: Workers prepared for the device.
        device: ``cuda``, or ``cpu`` for the interpreter.
        cases: Those to follow.
        errors: What each failed with.
        box: Seconds for all together; steps that began are given a few more.

    Returns:
        For each case ``name``, ``case``, ``error``, ``steps`` by name, and ``line``.
    """
    rounds = max(len(steps_of(case)) for case in cases.values())
    tasks = [
        Task(f"{name}\n{steps_of(case)[number]}", step, (case, device, steps_of(case)[number]))
        for number in range(rounds)
        for name, case in cases.items()
        if number < len(steps_of(case))
    ]
    found: dict[str, dict[str, Any]] = {name: {} for name in cases}
    until = time.monotonic() + box
    for ended in crew.run(tasks, limit=box + _GRACE, start_until=until, end_by=until + _GRACE):
        name, _, which = ended.task.name.partition("\n")
        if ended.how == "returned":
            found[name][which] = ended.value
        else:
            found[name][which] = {"failed": ended.error or "there was no time for it", "how": ended.how}
    return [
        {
            "name": name,
            "case": repr(case),
            "error": errors[name],
            "steps": found[name],
            "line": f"{name}: {conclude(errors[name], found[name])}",
        }
        for name, case in cases.items()
    ]


def conclude(error: str, steps: dict[str, dict[str, Any]]) -> str:
    """What the steps say, in a line.

    Args:
        error: What the case failed with.
        steps: By name, as ``triage_cases`` collects them.
    """
    look = steps.get("look", {})
    said = []
    if "failed" in look:
        said.append(f"it ends in {_short(look['failed'])}")
    elif not look.get("parts") and not look.get("faults"):
        said.append(f"it is right this time; it failed with {_short(error)}")
    for part in look.get("parts", [])[:2]:
        said.append(_where(part))
    said += look.get("faults", [])
    said += _causes(look, steps)
    died = [name for name, found in steps.items() if name != "look" and found.get("how") in ("died", "raised", "hung")]
    if died:
        said.append(f"{', '.join(died)} failed: {_short(steps[died[0]]['failed'])}")
    variants = [_variant(each) for each in look.get("variants", [])]
    return "; ".join([*said, *variants])


def _where(part: dict[str, Any]) -> str:
    first = part["first"]
    text = (
        f"{part['wrong']} values ({part['share']:.2%}) of {part['part']} are wrong, first row {first['row']} (position "
        f"{first['position']}, {first['kind']}) head {first['head']} dim {first['dim']}: {first['got']:.4g} instead of "
        f"{first['expected']:.4g}"
    )
    if part["nan"]:
        text += f", {part['nan']} are NaN"
    if part["error"] is not None:
        text += f", error {part['error']:.3g} where {part['budget']:.3g} is allowed"
    kinds = ", ".join(f"{name} {share:.1%}" for name, share in part["kinds"].items())
    return ", ".join([text, f"by rule: {kinds}", *part["pattern"]])


def _causes(look: dict[str, Any], steps: dict[str, dict[str, Any]]) -> list[str]:
    """What the changed launches rule in or out."""
    said = []
    reference = steps.get("reference", {})
    if "right" in reference:
        said.append(
            "PyTorch on the device is right with the same inputs: the kernel is wrong"
            if reference["right"]
            else f"PyTorch on the device is off by {reference['error']:.3g} with the same inputs: the inputs are wrong"
        )
    if look.get("unwritten"):
        said.append(f"{look['unwritten']} values are never written")
    if look.get("second_launch", "the same bits") != "the same bits":
        said.append(f"{look['second_launch']}: a race, or memory that was never written")
    clean = steps.get("clean", {})
    if clean.get("right"):
        said.append("right when slots that no row may read hold zeros: it reads them")
    for name, text in (
        ("no_split", "right without split keys: the parts or their merge"),
        ("wide_scores", "right with fp8 multiplied in 16 bits: the fp8 products"),
        ("no_lookahead", "right without looking ahead"),
        ("one_stage", "right with num_stages=1: the software pipeline"),
        ("four_warps", "right with 4 warps"),
        ("fp32", "right in fp32, other data: not the addresses, but 16-bit or 8-bit products"),
    ):
        if steps.get(name, {}).get("right"):
            said.append(text)
    flash = steps.get("flash", {})
    if "compared" in flash:
        said.append(
            f"beside FlashAttention, window without sinks and dense rows: the kernel has {flash['kernel']} wrong "
            f"values, FlashAttention {flash['flash']}"
        )
    return said


def _variant(facts: dict[str, Any]) -> str:
    return (
        f"{facts['kernel']} {facts['hash']} {facts['target']}: {facts['registers']} registers, {facts['spills']} "
        f"spills, {facts['shared_bytes']} B shared, {facts['num_warps']} warps, {facts['num_stages']} stages, Triton "
        f"{facts['triton']}"
    )


def _short(text: str) -> str:
    return " ".join(text.split())[:300]
