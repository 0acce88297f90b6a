"""Keeps a server from outliving its benchmark, however that ends, even if the server is stopped by SIGSTOP.

    python -m benchmarks.serving.leash LOG COMMAND...

Prints the server's process id, which is also its process group's, and waits. When standard input closes, because the
benchmark is gone, the whole group is killed. Exits with the server's status.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading


def main(log: str, *command: str) -> int:
    with open(log, "ab") as file:
        server = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
    print(server.pid, flush=True)

    def kill_when_alone() -> None:
        while os.read(sys.stdin.fileno(), 1):
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)

    threading.Thread(target=kill_when_alone, daemon=True).start()
    return server.wait()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
