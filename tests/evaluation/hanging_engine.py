"""An engine that never comes back from its second message, nor does its child; neither takes SIGTERM for an answer."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time

from vllm_trimix.backend.engines.messages import messages

SECONDS = 600


def main() -> None:
    if "stubborn" in sys.argv:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        time.sleep(SECONDS)
        return
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as replies:
        for number, _ in enumerate(messages()):
            if number:
                time.sleep(SECONDS)
            subprocess.Popen([sys.executable, __file__, "stubborn"])
            replies.write(json.dumps({"ready": {"hardware": "none"}}) + "\n")


if __name__ == "__main__":
    main()
