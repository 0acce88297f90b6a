"""Time to first token in real engines that share the device: each serves stock, triangle and pattern by request.

The engines start side by side, and are warm before the stage asks for the device to itself. Then one works at a time,
the others being idle, in interleaved rounds that fill a box of seconds. Every sample is saved as it comes.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

from benchmarks.gpu.box import Round, fill
from benchmarks.gpu.predicted import request_seconds
from benchmarks.gpu.report import Report
from benchmarks.gpu.served_engine import Engine, EngineLost
from benchmarks.gpu.served_plan import STOCK, engine_arguments, engine_environment, plan_engines
from benchmarks.gpu.served_results import MODES, Results, Rule, lines, of, targets, words
from benchmarks.gpu.speed import bench_model
from vllm_trimix.demo.bench_model import SHAPES
from vllm_trimix.patterns.registry import PATTERNS
from vllm_trimix.patterns.triangle import Triangle

# Of what the stage may still take when it has the device: to end the engines and to save.
_MARGIN_SECONDS = 5.0


def served(report: Report) -> None:
    """Starts the engines, warms them up, and measures round by round."""
    jobs = plan_engines(report.settings, report.environment.get("device_memory_bytes", math.inf))
    if not jobs:
        report.skip("the device is too small for one engine")
        return
    report.figure(
        server_bytes={name: job["bytes"] for name, job in jobs.items()},
        predicted=request_seconds(
            report.environment,
            lengths=report.settings["lengths"],
            chunks=report.settings["chunks"],
            density=report.settings["target_density"],
        )
        if report.settings["shape"] == "llama-3.1-8b"
        else [],
    )
    model = bench_model(
        report.folder / "model", report.settings["shape"], max(job["max_model_len"] for job in jobs.values())
    )
    with contextlib.ExitStack() as stack:

        def make(name: str, attempt: str = "") -> Engine:
            arguments = engine_arguments(report.settings, name, jobs[name], str(model))
            eager = {"enforce_eager": True} if attempt == "eager" else {}
            child = {"engine": arguments | eager, "stock": name == STOCK}
            log = report.folder / f"{'_'.join(filter(None, (name, attempt)))}.log"
            environment = engine_environment(name, cuda=report.cuda)
            return stack.enter_context(Engine(name, child, log, environment=environment))

        stage = _Stage(report, {name: make(name) for name in jobs})
        stage.start(make)
        # Even where no engine is left, the runner waits for the stage to ask.
        granted = report.alone() - _MARGIN_SECONDS
        stage.measure(min(report.settings["box"], granted))


class _Stage:
    """The engines that still answer, and what they said."""

    def __init__(self, report: Report, engines: dict[str, Engine]) -> None:
        self._report, self._settings = report, report.settings
        self._engines = engines
        self._names = [name for name in engines if name != STOCK]
        self._first = self._names[0]
        # Those that each engine answers.
        self._modes = {name: list(MODES) for name in self._names}
        self._results = Results()
        self._facts: dict[str, Any] = {}
        self._checked: set[tuple[str, str, int]] = set()
        self._cut_short: list[str] = []
        self._seed = 0

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
                        self._lose(error)
                        continue
                    tried.add(name)
                    self._engines[name] = make(name, attempt)
                    waits[wait(self._engines[name])] = name

    def _attempt(self, error: EngineLost) -> str | None:
        """How a lost engine is started once more, or None: one thing that it can't do must not cost every figure."""
        name = error.name
        answered = self._facts.get(name, {}).get("first_prompt_s")
        if answered and name != STOCK:
            # A mode ended it: the earlier ones are worth having.
            mode = next(mode for mode in MODES if mode not in answered)
            self._modes[name] = list(answered)
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
        self._facts[name] = facts
        self._report.figure(engines=self._facts)
        right = ("TRIMIX" in facts["backends"]) is (name != STOCK)
        line = f"ready after {facts['ready']:.0f} s, {facts['backends']}, {facts['kv_tokens']} tokens of KV cache"
        self._report.check(f"{name}: backend", right, line)
        # Serving compiles nothing: a first prompt that takes seconds longer than later ones says otherwise.
        first = facts["first_prompt_s"] = {}
        for mode in (None,) if name == STOCK else self._modes[name]:
            first[mode or STOCK] = self._generate(name, mode, self._settings["warm_up"])["ttft_s"]
            self._report.figure(engines=self._facts)

    def measure(self, box: float) -> None:
        """Fills the box with rounds, and concludes after each."""
        left = fill(self._rounds(), box) if self._names else ["every round"]
        self._report.figure(box_s=box, rounds_left_out=left)
        self._conclude(last=True)

    def _rounds(self) -> list[Round]:
        settings = self._settings
        first, *rest = self._names
        self._first = first
        lengths, most = settings["lengths"], settings["rounds"]
        decode, short, profile = settings["decode"], settings["short"], settings["profile"]
        stock_length, repeats = settings["stock_length"], settings["short_repeats"]
        rounds = [self._round(first, length, most) for length in lengths]
        for name in rest:
            rounds += [self._round(name, length, most) for length in settings["lengths_of_other_chunks"]]
        if STOCK in self._engines:
            cost = 2 * self._cost(stock_length)
            rounds.append(self._named("stock", self._beside_stock, cost, settings["stock_rounds"]))
            cost = 2 * decode["repeats"] * (self._cost(decode["prompts"] * decode["length"]) + 1)
            rounds.append(self._named("decode", self._decode, cost))
        rounds.append(self._named("profile", self._profile, 4 * self._cost(profile["length"])))
        cost = 2 * repeats * sum(self._cost(length) + 0.02 for length in short)
        rounds.append(self._named("short", self._short, cost))
        return rounds

    def _round(self, name: str, length: int, most: int) -> Round:
        modes = self._modes[name]

        def run(number: int) -> None:
            for mode in modes if number % 2 == 0 else modes[::-1]:
                self._sample(name, mode, length, number)

        return self._named(f"{name} {words(length)}", run, len(modes) * self._cost(length), most)

    def _named(self, name: str, run: Callable[[int], None], seconds: float, most: int = 1) -> Round:
        return Round(name, self._guarded(name, run), seconds, most)

    def _cost(self, length: int) -> float:
        """Seconds that a prompt is expected to take: so much a token, and so much for each pair of tokens."""
        linear, quadratic = self._settings["cost"]
        return linear * length + quadratic * length**2

    def _guarded(self, name: str, run: Callable[[int], None]) -> Callable[[int], bool]:
        """A round that ends with the engine it needs, and is concluded."""

        def guarded(number: int) -> bool:
            try:
                run(number)
            except EngineLost as error:
                self._lose(error)
                self._cut_short.append(name)
                self._report.figure(rounds_cut_short=self._cut_short)
                return False
            finally:
                self._conclude()
            return True

        return guarded

    def _lose(self, error: EngineLost) -> None:
        """Goes on without an engine, and says so once."""
        if self._engines.pop(error.name, None) is None:
            return
        self._report.check(f"{error.name} answers", False, str(error))
        self._names = [name for name in self._names if name != error.name]

    def _generate(self, name: str, mode: str | None, length: int, **more: Any) -> dict[str, Any]:
        return self._ask(name, "generate", mode=mode, length=length, **more)

    def _ask(self, name: str, what: str, **message: Any) -> dict[str, Any]:
        if name not in self._engines:
            raise EngineLost(name, "was lost before")
        # New prompts each time: nothing may be known of them.
        self._seed += 1
        with self._report.on_device():
            return self._engines[name].ask(what, limit=self._settings["answer_limit"], seed=self._seed, **message)

    def _sample(self, name: str, mode: str | None, length: int, number: int) -> None:
        answer = self._generate(name, mode, length)
        self._results.add(name, mode, length, number, answer)
        self._report.figure(samples=self._results.samples)
        if mode is not None and (name, mode, length) not in self._checked:
            self._checked.add((name, mode, length))
            expected = self._rule(name).rows(mode, length)
            counted = {key: answer["rows"].get(key, 0) for key in expected}
            self._report.check(
                f"{name} {mode} {words(length)}: rows",
                counted == expected,
                f"counted {counted}, prompt arithmetic {expected}",
            )

    def _rule(self, name: str) -> Rule:
        entry, layers = self._settings["trimix"], SHAPES[self._settings["shape"]].layers
        triangle = Triangle(**{key: entry[key] for key in ("n_init", "n_local", "last_n") if key in entry})
        budget = {key: value for key, value in entry["shallow"].items() if key not in ("pattern", "min_seq_len")}
        return Rule(
            chunk=self._facts[name]["chunk"],
            last_n=triangle.last_n,
            dense_len=triangle.dense_len,
            triangle_layers=layers - entry["starting_layer"],
            pattern_layers=entry["starting_layer"],
            block_size=PATTERNS[entry["shallow"]["pattern"]](**budget).block_size,
        )

    def _beside_stock(self, number: int) -> None:
        both = [(STOCK, None), (self._first, "off")]
        for name, mode in both if number % 2 == 0 else both[::-1]:
            self._sample(name, mode, self._settings["stock_length"], f"stock {number}")

    def _decode(self, number: int) -> None:
        settings = self._settings["decode"]
        load = {key: settings[key] for key in ("length", "prompts", "tokens")}
        both = [(STOCK, None), (self._first, self._modes[self._first][-1])]
        for name, mode in both:
            self._generate(name, mode, **load)
        for repeat in range(settings["repeats"]):
            for name, mode in both if repeat % 2 == 0 else both[::-1]:
                answer = self._generate(name, mode, **load)
                self._results.between.setdefault(name, []).append(answer["between_s"])
                self._report.figure(between_tokens_s=self._results.between)

    def _profile(self, number: int) -> None:
        for mode in self._modes[self._first][:2]:
            found = self._ask(self._first, "profile", mode=mode, **self._settings["profile"])
            self._results.profiles[mode] = found
            self._report.figure(profiles=self._results.profiles)
            self._report.check(f"profile of {mode}", "failed" not in found, found.get("failed", ""))

    def _short(self, number: int) -> None:
        for length in self._settings["short"]:
            for repeat in range(self._settings["short_repeats"]):
                modes = self._modes[self._first][:2]
                for mode in modes if repeat % 2 == 0 else modes[::-1]:
                    self._sample(self._first, mode, length, repeat)

    def _conclude(self, *, last: bool = False) -> None:
        settings, results = self._settings, self._results
        names = sorted(set(self._facts) - {STOCK}, key=lambda name: -self._facts[name]["chunk"])
        if not names:
            return
        reached = targets(
            results,
            names,
            longest=max(settings["lengths"]),
            at_density=settings["target_density"],
            short=settings["short"],
        )
        self._report.figure(targets=reached)
        self._report.seen(lines(results, names, settings["lengths"]))
        if last and self._report.cuda and not self._report.toy:
            # Of shorter prompts only the targets: there is little to gain.
            for length in sorted(settings["lengths"]):
                for name in names:
                    for mode in MODES[1:]:
                        speedup = of(results.speedups(name, mode, length))
                        if speedup is not None:
                            line = f"{speedup['median']:.2f}x, {speedup['interval']}"
                            self._report.check(
                                f"{name} {mode} {words(length)}: faster than stock", speedup["median"] > 1, line
                            )
