"""Between the runner and a stage: holds the stage to its time, and ends whatever it started.

python -m benchmarks.gpu.running.supervisor SECONDS LOG COMMAND...

Every descendant of a stage is a descendant of its supervisor, also when the process between them is gone, so stages
that run side by side can be ended one by one. The exit status is the command's; 124 if its time ran out.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.gpu.running.processes import Terminated, adopt_orphans, end_descendants, run_limited, terminable

TIME_RAN_OUT = 124


def main(seconds: str, log: str, *command: str) -> int:
    """Runs the command."""
    adopt_orphans()
    try:
        with terminable():
            status = run_limited(command, log=Path(log), limit=float(seconds))
    except Terminated:
        return 143
    finally:
        # A second signal cuts the polite end short: what is left dies here.
        end_descendants(0)
    if status is None:
        return TIME_RAN_OUT
    return status if status >= 0 else 128 - status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
