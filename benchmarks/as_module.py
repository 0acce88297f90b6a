"""Goes on as a module of ``benchmarks`` where one was started by its file: ``python benchmarks/benchmark_ttft.py``.

The interpreter then looks for modules in the file's folder, where it finds this one and no package ``benchmarks``.
Names that others may ask for lie there too (``kernels``, ``models``), so that the folder must not stay on the path.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import NoReturn


def run(file: str) -> NoReturn:
    """Runs the module that the file is, as ``python -m`` would, and ends with it.

    Args:
        file: In this folder.
    """
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(entry for entry in sys.path if Path(entry).resolve() != here)]
    runpy.run_module(f"{here.name}.{Path(file).stem}", run_name="__main__", alter_sys=True)
    sys.exit()
