"""What several commands print."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any


def teller(command: str) -> Callable[[str], None]:
    """What prints lines about how a command goes; its results alone go to stdout."""

    def say(text: str) -> None:
        print(f"{command}: {text}", file=sys.stderr, flush=True)

    return say


def serve_command(model: str, entry: dict[str, Any], *, flags: Sequence[str] = ()) -> str:
    """The ``vllm serve`` command that serves a model with a ``trimix`` entry.

    Args:
        model: HF id or path.
        entry: The entry.
        flags: More engine flags.
    """
    backend = [] if "TRIMIX" in flags else ["--attention-backend", "TRIMIX"]
    additional = json.dumps({"trimix": entry})
    return shlex.join(["vllm", "serve", model, *backend, *flags, "--additional-config", additional])
