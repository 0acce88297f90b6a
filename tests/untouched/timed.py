"""Times one engine job with and without the plugin, in turns: job on stdin, a line for each round on stdout.

vLLM is imported once, here; each round forks two processes of it before any plugin is loaded, one with the plugin and
one without, which then start an engine of their own.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.forks import Fork


def _engine(job: dict[str, Any], plugins: str) -> Callable[[Any], Any]:
    os.environ["VLLM_PLUGINS"] = plugins
    from vllm import LLM, SamplingParams

    llm = LLM(skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False, **job["engine"])
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    ours = sorted(name for name in sys.modules if name.split(".", 1)[0] == "vllm_trimix")

    def answer(message: str) -> Any:
        """``ours``: what of this package the engine has loaded; ``job``: seconds by the wall and of the processor."""
        if message == "ours":
            return ours
        start, used = time.perf_counter(), time.process_time()
        llm.generate(prompts, params, use_tqdm=False)
        return [time.perf_counter() - start, time.process_time() - used]

    return answer


def run_round(job: dict[str, Any], order: tuple[str, str]) -> dict[str, Any]:
    """One pair of processes: what each has loaded, and the times of their turns, the first one alternating."""
    engines: dict[str, Fork] = {}
    try:
        ours = {}
        for plugins in order:
            engines[plugins] = Fork(functools.partial(_engine, job, plugins))
            # Started before the next one is.
            ours[plugins] = engines[plugins].ask("ours")
        for _ in range(job["warm_up"]):
            for plugins in order:
                engines[plugins].ask("job")
        turns = []
        for turn in range(job["turns"]):
            took = {plugins: engines[plugins].ask("job") for plugins in (order if turn % 2 else order[::-1])}
            turns.append([took[""], took["trimix"]])
        return {"ours": ours, "turns": turns}
    finally:
        for engine in engines.values():
            engine.stop()


def main() -> None:
    job = json.load(sys.stdin)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    # What an engine imports, all but what plugins are loaded by.
    for module in ("vllm.entrypoints.llm", "vllm.v1.engine.core", "vllm.v1.worker.cpu_worker"):
        importlib.import_module(module)

    # Everything else that prints goes elsewhere.
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    for number in range(job["rounds"]):
        order = ("", "trimix") if number % 2 == 0 else ("trimix", "")
        out.write(json.dumps(run_round(job, order)) + "\n")


if __name__ == "__main__":
    main()
