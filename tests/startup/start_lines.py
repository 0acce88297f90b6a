"""A child of ``test_start_lines``: start-up lines foretold, and those of real engines, as JSON.

The job on stdin is ``{"previews": {name: [model, entry, flags]}, "engines": {name: [model, entry, arguments, prompt
length]}}``; results go to the file that the first argument names.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"


class Lines:
    """In place of the log: what TRIMIX says of an engine, with the level."""

    def __init__(self) -> None:
        """Listens."""
        from vllm_trimix.backend import announce

        self.said: list[tuple[str, str]] = []
        announce.logger = self

    def info(self, message: str, *values: object) -> None:
        """Keeps it."""
        self.said.append(("INFO", message % values))

    def warning(self, message: str, *values: object) -> None:
        """Keeps it."""
        self.said.append(("WARNING", message % values))


def foretell(model: str, entry: dict[str, Any], flags: list[str]) -> dict[str, Any] | str:
    """What ``doctor`` would say."""
    from vllm_trimix.backend.preview import preview

    try:
        seen = preview(model, {"trimix": entry}, flags)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return {"line": seen.line, "warning": seen.warning, "unsure": seen.unsure, "sparse": sorted(seen.sparse)}


def serve(lines: Lines, model: str, entry: dict[str, Any], arguments: dict[str, Any], length: int) -> dict[str, Any]:
    """What an engine says at start, and its counters after one prompt."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    from vllm_trimix.backend import requests

    lines.said.clear()
    engine = {"skip_tokenizer_init": True, "enforce_eager": True, "load_format": "dummy", "disable_log_stats": True}
    llm = LLM(
        model=model,
        attention_backend="TRIMIX",
        additional_config={"trimix": {**entry, "stats_log_interval": 0}},
        **{**engine, **arguments},
    )
    params = SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, detokenize=False)
    llm.generate([{"prompt_token_ids": [3 + index % 200 for index in range(length)]}], params, use_tqdm=False)
    totals = [step.stats.snapshot() for step in requests.all_steps()]
    said = list(lines.said)
    del llm
    gc.collect()
    cleanup_dist_env_and_memory()
    return {"said": said, "totals": totals}


def main() -> None:
    """Does the job."""
    job = json.load(sys.stdin)
    found: dict[str, Any] = {"previews": {}, "engines": {}}
    lines = Lines()
    for name, (model, entry, arguments, length) in job["engines"].items():
        found["engines"][name] = serve(lines, model, entry, arguments, length)
    # Afterwards: vLLM keeps rotary embeddings for the next model, and those of a preview have no memory.
    for name, (model, entry, flags) in job["previews"].items():
        found["previews"][name] = foretell(model, entry, flags)
    with open(sys.argv[1], "w") as file:
        json.dump(found, file)


if __name__ == "__main__":
    main()
