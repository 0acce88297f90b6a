"""The rounds of the served stage, and what follows from them after each."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.gpu.report import Report
from benchmarks.gpu.served.box import Round, fill
from benchmarks.gpu.served.engine import EngineLost
from benchmarks.gpu.served.engines import Engines
from benchmarks.gpu.served.plan import STOCK
from benchmarks.gpu.served.results import MODES, Results, Rule, lines, of, targets, words
from vllm_trimix.demo.bench_model import SHAPES
from vllm_trimix.patterns.registry import PATTERNS
from vllm_trimix.patterns.triangle import Triangle


class Measurement:
    """What the engines are asked, round by round, and what they said."""

    def __init__(self, report: Report, engines: Engines) -> None:
        self._report, self._settings = report, report.settings
        self._engines = engines
        self._first = next(iter(engines.modes))
        self._results = Results()
        self._checked: set[tuple[str, str, int]] = set()
        self._cut_short: list[str] = []

    def fill(self, box: float) -> None:
        """Fills the box with rounds, and concludes after each."""
        left = fill(self._rounds(), box) if self._engines.names else ["every round"]
        self._report.figure(box_s=box, rounds_left_out=left)
        self._conclude(last=True)

    def _rounds(self) -> list[Round]:
        settings = self._settings
        first, *rest = self._engines.names
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
        modes = self._engines.modes[name]

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
                self._engines.lose(error)
                self._cut_short.append(name)
                self._report.figure(rounds_cut_short=self._cut_short)
                return False
            finally:
                self._conclude()
            return True

        return guarded

    def _sample(self, name: str, mode: str | None, length: int, number: int | str) -> None:
        answer = self._engines.generate(name, mode, length)
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
            chunk=self._engines.facts[name]["chunk"],
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
        both = [(STOCK, None), (self._first, self._engines.modes[self._first][-1])]
        for name, mode in both:
            self._engines.generate(name, mode, **load)
        for repeat in range(settings["repeats"]):
            for name, mode in both if repeat % 2 == 0 else both[::-1]:
                answer = self._engines.generate(name, mode, **load)
                self._results.between.setdefault(name, []).append(answer["between_s"])
                self._report.figure(between_tokens_s=self._results.between)

    def _profile(self, number: int) -> None:
        for mode in self._engines.modes[self._first][:2]:
            found = self._engines.ask(self._first, "profile", mode=mode, **self._settings["profile"])
            self._results.profiles[mode] = found
            self._report.figure(profiles=self._results.profiles)
            self._report.check(f"profile of {mode}", "failed" not in found, found.get("failed", ""))

    def _short(self, number: int) -> None:
        for length in self._settings["short"]:
            for repeat in range(self._settings["short_repeats"]):
                modes = self._engines.modes[self._first][:2]
                for mode in modes if repeat % 2 == 0 else modes[::-1]:
                    self._sample(self._first, mode, length, repeat)

    def _conclude(self, *, last: bool = False) -> None:
        settings, results = self._settings, self._results
        names = sorted(set(self._engines.facts) - {STOCK}, key=lambda name: -self._engines.facts[name]["chunk"])
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
