"""The engines that share the device: started side by side, warmed up, and done without where they are lost."""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from benchmarks.gpu.report import Report
from benchmarks.gpu.served.engine import Engine, EngineLost
from benchmarks.gpu.served.plan import STOCK
from benchmarks.gpu.served.results import MODES


class Engines:
    """The engines that still answer.

    Attributes:
        names: Of those that serve TRIMIX.
        modes: The modes that each of them answers.
        facts: What each engine that has been ready said of itself, by name.
    """

    def __init__(self, report: Report, engines: dict[str, Engine]) -> None:
        self._report, self._settings = report, report.settings
        self._engines = engines
        self.names = [name for name in engines if name != STOCK]
        self.modes = {name: list(MODES) for name in self.names}
        self.facts: dict[str, Any] = {}
        self._seed = 0

    def __contains__(self, name: str) -> bool:
        return name in self._engines

    def start(self, make: Callable[[str, str], Engine]) -> None:
        """Waits for every engine; each is warmed up as soon as it is ready, and started once more where it is lost.

        Args:
            make: Starts an engine, given its name and which attempt it is.
        """
        deadline = time.monotonic() + self._settings["start_limit"]
        with ThreadPoolExecutor(len(self._engines)) as pool:

            def wait(engine: Engine) -> Future[None]:
                return pool.submit(engine.wait_ready, max(1.0, deadline - time.monotonic()))

            waits = {wait(engine): name for name, engine in self._engines.items()}
            tried: set[str] = set()
            while waits:
                ready = next(as_completed(waits))
                name = waits.pop(ready)
                try:
                    ready.result()
                    self._warm_up(name)
                except EngineLost as error:
                    attempt = None if name in tried or time.monotonic() > deadline else self._attempt(error)
                    if attempt is None:
                        self.lose(error)
                        continue
                    tried.add(name)
                    self._engines[name] = make(name, attempt)
                    waits[wait(self._engines[name])] = name

    def _attempt(self, error: EngineLost) -> str | None:
        """How a lost engine is started once more, or None: one thing that it can't do must not cost every figure."""
        name = error.name
        answered = self.facts.get(name, {}).get("first_prompt_s")
        if answered and name != STOCK:
            # A mode ended it: the earlier ones are worth having.
            mode = next(mode for mode in MODES if mode not in answered)
            self.modes[name] = list(answered)
            self._report.check(
                f"{name} answers {mode}", False, f"{error}; it is started again, for {', '.join(answered)} alone"
            )
            return "again"
        if self._settings["engine"].get("enforce_eager"):
            return None
        # What it can't compile, another version of PyTorch or Triton say.
        self._report.check(f"{name} starts compiled", False, f"{error}; it is started again, eagerly")
        return "eager"

    def _warm_up(self, name: str) -> None:
        facts = self._engines[name].facts
        self.facts[name] = facts
        self._report.figure(engines=self.facts)
        right = ("TRIMIX" in facts["backends"]) is (name != STOCK)
        line = f"ready after {facts['ready']:.0f} s, {facts['backends']}, {facts['kv_tokens']} tokens of KV cache"
        self._report.check(f"{name}: backend", right, line)
        # Serving compiles nothing: a first prompt that takes seconds longer than later ones says otherwise.
        first = facts["first_prompt_s"] = {}
        for mode in (None,) if name == STOCK else self.modes[name]:
            first[mode or STOCK] = self.generate(name, mode, self._settings["warm_up"])["ttft_s"]
            self._report.figure(engines=self.facts)

    def lose(self, error: EngineLost) -> None:
        """Goes on without an engine, and says so once."""
        if self._engines.pop(error.name, None) is None:
            return
        self._report.check(f"{error.name} answers", False, str(error))
        self.names = [name for name in self.names if name != error.name]

    def generate(self, name: str, mode: str | None, length: int, **more: Any) -> dict[str, Any]:
        return self.ask(name, "generate", mode=mode, length=length, **more)

    def ask(self, name: str, what: str, **message: Any) -> dict[str, Any]:
        if name not in self._engines:
            raise EngineLost(name, "was lost before")
        # New prompts each time: nothing may be known of them.
        self._seed += 1
        with self._report.on_device():
            return self._engines[name].ask(what, limit=self._settings["answer_limit"], seed=self._seed, **message)
