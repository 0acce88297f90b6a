"""``python -m tests.launches.table`` prints the tables of docs/launches.md, which tests compare with it.

The second one compiles every kernel of ``cases.compiled`` and takes minutes; ``--recorded`` leaves it out.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from tests.launches import cases, worker
from tests.launches.limits import INT32_MAX, SHARED_BYTES
from tests.launches.situations import Situation

_TITLES = {
    "whole": "whole prompt in one step",
    "chunk8192": "last 8192 tokens",
    "chunk2048": "last 2048 tokens",
    "middle8192": "8192 tokens in the middle",
    "mixed128": "128 requests, mixed",
    "tails128": "128 requests, last rows",
}
_KERNELS = {
    "triangle_prefill_kernel": "triangle",
    "merge_partials_kernel": "merge",
    "sparse_prefill_kernel": "sparse",
    "estimate_kernel": "estimate",
}


def situations() -> list[Situation]:
    """The rows of the first table: Llama-70B's heads of 128, bf16, pages of 16 tokens, on an H200."""
    found = [Situation(step, tp=tp) for tp in (1, 8) for step in cases.TRIANGLE_STEPS]
    found.append(Situation("whole", (64, 1)))
    return found + [
        Situation(tp=tp, pattern=pattern)
        for tp, patterns in ((1, ("vertical_slash",)), (8, cases.PATTERNS))
        for pattern in patterns
        if pattern != "mixed"
    ]


def recorded(found: Iterable[dict[str, Any]]) -> str:
    """The first table, of the situations' findings."""
    lines = [
        "| pattern | step | heads, KV heads of a rank | launches a layer | programs of the largest "
        "| uploaded (bytes a step) | largest 32-bit number | of what fits (%) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for situation, each in zip(situations(), found, strict=True):
        heads = ", ".join(map(str, situation.local_heads))
        pattern, step = situation.pattern or "triangle", _TITLES[situation.step]
        lines.append(
            f"| {pattern} | {step} | {heads} | {each['launches']} | {each['programs']} | {each['uploaded']} "
            f"| {each['largest']} | {100 * each['largest'] / INT32_MAX:.2f} |"
        )
    return "\n".join(lines)


def compiled(reports: Iterable[dict[str, Any]]) -> str:
    """The second table: what the largest of each kernel needs of each GPU."""
    largest: dict[tuple[int, str], tuple[int, int]] = {}
    for report in reports:
        key = report["capability"], _KERNELS[report["kernel"]]
        shared, registers = largest.get(key, (0, 0))
        largest[key] = max(shared, report["shared_bytes"]), max(registers, report["registers"] * report["num_warps"])
    kernels = list(_KERNELS.values())
    lines = [
        f"| GPU | a block may use (KiB) | {' | '.join(f'{kernel} (KiB, registers)' for kernel in kernels)} |",
        "|---|---|" + "---|" * len(kernels),
    ]
    for capability, limit in SHARED_BYTES.items():
        cells = [
            f"{shared / 1024:.1f}, {32 * registers}"
            for shared, registers in (largest[capability, kernel] for kernel in kernels)
        ]
        lines.append(f"| sm_{capability} | {limit // 1024} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.launches.table", description=__doc__)
    parser.add_argument("--recorded", action="store_true", help="the first table only")
    options = parser.parse_args()
    print(recorded(map(worker.examine, situations())))
    if not options.recorded:
        print(f"\n{compiled(report for each in cases.compiled() for report in worker.compile_kernels(each))}")


if __name__ == "__main__":
    main()
