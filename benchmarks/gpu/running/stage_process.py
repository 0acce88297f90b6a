"""The process of one stage.

python -m benchmarks.gpu.running.stage_process RESULT.json MODULE:FUNCTION
"""

from __future__ import annotations

import importlib
import sys
import traceback
from pathlib import Path

from benchmarks.gpu.report import Report


def main(path: str, function: str) -> int:
    """Runs the stage; an exception becomes its last, failed check."""
    report = Report(Path(path))
    module, _, name = function.partition(":")
    try:
        getattr(importlib.import_module(module), name)(report)
    except Exception as error:
        traceback.print_exc()
        report.check("ran to its end", False, f"{type(error).__name__}: {error}"[-2000:])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
