"""What a command tells the process that holds its engine, line by line, until the command is no more."""

from __future__ import annotations

import os
import queue
import signal
import threading
import time
from collections.abc import Iterator

# After the end of input, until everything is ended by force: an idle engine ends by itself, one that loads or computes
# may not come to that.
_IDLE_SECONDS, _BUSY_SECONDS = 15.0, 5.0


def messages() -> Iterator[bytes]:
    """Lines of stdin, until the command closes it or is no more: then this process and its children end as well.

    A thread of its own reads, so that the end is seen while the engine is loaded or computes.
    """
    lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
    waits = threading.Event()

    def read() -> None:
        unread = b""
        # Not by sys.stdin, whose lock a waiting thread would hold when the interpreter ends.
        while chunk := os.read(0, 65536):
            *whole, unread = (unread + chunk).split(b"\n")
            for line in whole:
                lines.put(line)
        lines.put(None)
        time.sleep(_IDLE_SECONDS if waits.is_set() else _BUSY_SECONDS)
        # The group is this process's own (EngineProcess); by hand it may be a shell's.
        if os.getpgrp() == os.getpid():
            os.killpg(os.getpgrp(), signal.SIGKILL)
        os._exit(1)

    threading.Thread(target=read, daemon=True).start()
    while True:
        waits.set()
        line = lines.get()
        if line is None:
            return
        waits.clear()
        yield line
