"""Times one engine job with and without the plugin, in turns: job on stdin, a line for each round on stdout.

vLLM is imported once, here; each round forks two processes of it before any plugin is loaded, one with the plugin and
one without, which then start an engine of their own. Between two jobs an engine waits on a pipe and uses no processor.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import time
from typing import Any

Times = list[float]


class Engine:
    """A forked process with an engine."""

    def __init__(self, job: dict[str, Any], plugins: str) -> None:
        asked, self._ask = os.pipe()
        self._answers, answered = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(self._ask)
            os.close(self._answers)
            try:
                _serve(job, plugins, asked, answered)
            finally:
                # Not the parent's own clean-up.
                os._exit(1)
        os.close(asked)
        os.close(answered)
        self._lines = os.fdopen(self._answers)
        self.ours: list[str] = json.loads(self._lines.readline())

    def seconds(self) -> Times:
        """Of one job: on the wall's clock, and of processor time."""
        os.write(self._ask, b"\n")
        found: Times = json.loads(self._lines.readline())
        return found

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self._ask)
        self._lines.close()


def _serve(job: dict[str, Any], plugins: str, asked: int, answered: int) -> None:
    os.environ["VLLM_PLUGINS"] = plugins
    from vllm import LLM, SamplingParams

    llm = LLM(skip_tokenizer_init=True, enforce_eager=True, enable_prefix_caching=False, **job["engine"])
    params = SamplingParams(temperature=0, max_tokens=job["max_tokens"], ignore_eos=True, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in job["prompts"]]
    ours = sorted(name for name in sys.modules if name.split(".", 1)[0] == "vllm_trimix")
    os.write(answered, json.dumps(ours).encode() + b"\n")
    while os.read(asked, 1):
        start, used = time.perf_counter(), time.process_time()
        llm.generate(prompts, params, use_tqdm=False)
        took = [time.perf_counter() - start, time.process_time() - used]
        os.write(answered, json.dumps(took).encode() + b"\n")


def run_round(job: dict[str, Any], order: tuple[str, str]) -> dict[str, Any]:
    """One pair of processes: what each has loaded, and the times of their turns, the first one alternating."""
    engines: dict[str, Engine] = {}
    try:
        for plugins in order:
            engines[plugins] = Engine(job, plugins)
        for _ in range(job["warm_up"]):
            for plugins in order:
                engines[plugins].seconds()
        turns = []
        for turn in range(job["turns"]):
            took = {plugins: engines[plugins].seconds() for plugins in (order if turn % 2 else order[::-1])}
            turns.append([took[""], took["trimix"]])
        return {"ours": {plugins: engine.ours for plugins, engine in engines.items()}, "turns": turns}
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
