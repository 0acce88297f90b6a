"""What each kernel variant needs under each version of Triton: stored reports, and the page made of them.

``python -m benchmarks.kernels.compile_tables`` prints what differs between the versions and writes
``docs/kernel-tables.md``. With ``--compile VERSION ...`` it first compiles the default variants anew with those
versions; wheels that aren't installed are fetched into ``build``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.kernels.bounds.compiled import VERSIONS, read_reports, reports_file
from benchmarks.kernels.generated import fill

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs/kernel-tables.md"
# A version may shuffle a few instructions; what a kernel feels is more.
_LEAST_INSTRUCTIONS = 0.05


def compile_reports(folder: Path, *, triton: Path | None = None, arguments: list[str] | None = None) -> tuple[str, Any]:
    """Runs the compile tool in a process of its own, from scratch and never interpreted.

    Args:
        folder: For its files; exists.
        triton: A folder with another Triton than the installed one.
        arguments: Of the command; none compiles the default variants.

    Returns:
        What it prints, and its reports as JSON.

    Raises:
        RuntimeError: It failed, with what it says.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder / "cache")
    if triton is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(triton), environment.get("PYTHONPATH", "")])
    file = folder / "reports.json"
    command = [sys.executable, "-m", "vllm_trimix.kernels.triton_compile", "--json", str(file), *(arguments or [])]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{run.stderr}")
    return run.stdout, json.loads(file.read_text())


def store(version: str, reports: list[dict[str, Any]]) -> None:
    """Writes reports, one a line, so that a difference shows which."""
    lines = ",\n".join(json.dumps(report) for report in reports)
    reports_file(version).write_text(f"[\n{lines}\n]\n")


def differences() -> str:
    """Variants that one version compiles to something slower or faster than another, as a Markdown table."""
    by_version = [{json.dumps(report["variant"]): report for report in read_reports(version)} for version in VERSIONS]
    lines = [
        f"| target | kernel | head size | query / cache | {' | '.join(VERSIONS)} |",
        f"|---|---|---|---|{'---|' * len(VERSIONS)}",
    ]
    for key, first in by_version[0].items():
        same = [reports[key] for reports in by_version]
        if not any(_differ(first, other) for other in same[1:]):
            continue
        v = first["variant"]
        cells = " | ".join(_needs(report) for report in same)
        dtypes = f"{v['q_dtype']} / {v['cache_dtype']}"
        lines.append(f"| sm_{v['capability']} | {v['kernel']} | {v['head_size']} | {dtypes} | {cells} |")
    return "\n".join(lines)


def _differ(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether a kernel would feel it."""
    if any(one[name] != other[name] for name in ("spill_bytes", "programs", "loop_waits", "matrix_instruction")):
        return True
    unmasked = [report["loop_instructions"] - report["mask_instructions"] for report in (one, other)]
    return abs(unmasked[0] - unmasked[1]) > _LEAST_INSTRUCTIONS * max(unmasked)


def _needs(report: dict[str, Any]) -> str:
    loop = report["loop_instructions"] - report["mask_instructions"]
    shown = f"{report['registers']} reg, {report['programs']} prog"
    if report["spill_bytes"]:
        shown += f", {report['spill_bytes']} B spilled"
    return f"{shown}, {loop} instr, {report['loop_waits']} waits" if loop else shown


def parts() -> dict[str, str]:
    """The generated parts of the page."""
    # Triton may be missing, or another version than a table's.
    from vllm_trimix.kernels.triton_compile import Report, Variant, markdown

    tables = {}
    for version in VERSIONS:
        reports = []
        for report in read_reports(version):
            variant = Variant(**{**report["variant"], "sparse": tuple(report["variant"]["sparse"])})
            reports.append(Report(**{**report, "variant": variant}))
        tables[f"triton-{version}"] = markdown(reports)
    return {"differences": differences(), **tables}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.compile_tables", description=__doc__)
    parser.add_argument("--compile", nargs="+", choices=VERSIONS, default=[], metavar="VERSION", help="compile anew")
    for version in parser.parse_args().compile:
        with tempfile.TemporaryDirectory() as folder:
            _, reports = compile_reports(Path(folder), triton=_triton(version))
        store(version, reports)
    PAGE.write_text(fill(PAGE.read_text(), parts()))
    print(differences())


def _triton(version: str) -> Path | None:
    """Where a version is; None where it is the installed one.

    Raises:
        RuntimeError: It can't be fetched.
    """
    # May be missing.
    import triton

    from tests.wheels import fetch

    if triton.__version__ == version:
        return None
    folder = ROOT / "build" / f"triton-{version}"
    if missing := fetch(f"triton=={version}", folder):
        raise RuntimeError(missing)
    return folder


if __name__ == "__main__":
    main()
