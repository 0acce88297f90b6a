"""Scenarios of ``tests.backend`` one by one, on one dense backend: what its tests ask of all of them together."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
import traceback
from pathlib import Path
from unittest import mock

DENSE = "TRITON_ATTN"
USED = (
    "preempted_and_resumed",
    "ids_reused",
    "rows_gathered_or_sliced",
    "dummy_runs",
    "single_rows_with_graphs",
    "test_plans_only_the_step_being_executed",
)
"""All that mutants are mapped to: without any defect they run together, because most of their time is vLLM's import."""


def preload() -> None:
    """Imports vLLM as ``tests.backend.cuda_on_cpu`` would, which stays the one that prepares it."""
    os.environ.update(
        TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR"
    )
    import vllm.platforms
    from vllm.platforms.cpu import CpuPlatform

    vllm.platforms._current_platform = CpuPlatform()
    # Else vLLM turns Triton off for good.
    vllm.platforms.vllm_version_matches_substr = lambda _: False
    importlib.import_module("vllm.v1.worker.gpu.model_runner")
    importlib.import_module("vllm.v1.worker.gpu_model_runner")


def first_wrong(names: list[str]) -> str:
    """The first scenario with a problem, or nothing; the problems are printed.

    Args:
        names: Of scenarios, or of tests of ``TestComposedClasses``.
    """
    from tests.backend import composition_child
    from tests.backend.report import problems
    from tests.backend.test_cuda_composition import TestComposedClasses

    scenarios = [name for name in names if not hasattr(TestComposedClasses, name)]
    # Without a name the child would drive all of them.
    driven = scenarios or ["short_prompts"]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "report.json"
        with (
            mock.patch.object(composition_child, "DENSE", (DENSE,)),
            mock.patch.object(sys, "argv", ["scenario", str(out), *driven]),
        ):
            try:
                composition_child.main()
            except Exception:
                # Of the facts; a scenario's is in its findings.
                traceback.print_exc()
                return names[0]
        report = json.loads(out.read_text())
    for name in names:
        if name not in scenarios:
            try:
                getattr(TestComposedClasses(), name)(report, DENSE)
            except AssertionError as error:
                print(name, error)
                return name
            continue
        found = problems(report["scenarios"][f"{DENSE}-{name}"])
        if found:
            print(name, *found, sep="\n")
            return name
    return ""
