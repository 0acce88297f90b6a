"""Times contenders against each other: warm-up, correctness first, then interleaved rounds."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from tqdm import tqdm

from benchmarks.kernels.contenders import Contender, Prepared
from benchmarks.kernels.problem import Problem
from benchmarks.kernels.reference import Error, Mask, Reference, make_reference

# Larger than any L2 cache; on CPU the contenders' own working sets evict one another.
_FLUSH_BYTES = 512 * 2**20


def time_call(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call: wall clock on CPU; on CUDA by events, with the L2 cache flushed."""
    if device.type == "cpu":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=device)
    start_event, end_event = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    # Over a millisecond: the host must stay ahead of the device for all that is timed, a dozen launches at 32K tokens.
    for _ in range(4):
        flush.random_()
    start_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize(device)
    return start_event.elapsed_time(end_event) / 1000


@dataclass
class Result:
    """One contender on one prompt.

    Attributes:
        status: ``ok``, ``refused`` (wrong output, so no time) or ``failed``.
        reason: Why not ``ok``, or None.
        samples: Seconds of each round; empty unless ``ok``.
        plan_samples: Seconds of each round's planning on the host.
        error: Distance from the truth, or None.
        budget: The most that it may be.
    """

    status: str = "ok"
    reason: str | None = None
    samples: list[float] = field(default_factory=list)
    plan_samples: list[float] = field(default_factory=list)
    error: Error | None = None
    budget: Error | None = None

    def withdraw(self, status: str, reason: str) -> None:
        """Takes the times back."""
        self.status, self.reason = status, reason
        self.samples, self.plan_samples = [], []


class _Runner:
    """A contender that still takes part."""

    def __init__(self, prepared: Prepared, reference: Reference, result: Result, device: torch.device) -> None:
        self._prepared, self._reference, self._result, self._device = prepared, reference, result, device
        self._outputs: list[torch.Tensor] = []

    def _run(self) -> None:
        self._outputs = self._prepared.run()

    def check(self) -> None:
        """Compares the last outputs with the truth."""
        error = self._reference.error(self._outputs)
        if self._result.error is None or error.largest > self._result.error.largest:
            self._result.error = error
        fault = self._reference.fault(error)
        if fault is not None:
            self._result.withdraw("refused", fault)

    def warm_up(self) -> None:
        for _ in range(2):
            self._prepared.plan()
            self._run()
        self.check()
        self._outputs = []

    def round(self, *, last: bool) -> None:
        """One sample. Planning counts on CPU; on CUDA vLLM does it once a step for all layers, ahead of the device."""
        start = time.perf_counter()
        self._prepared.plan()
        planned = time.perf_counter() - start
        seconds = time_call(self._run, self._device)
        self._result.plan_samples.append(planned)
        self._result.samples.append(seconds + planned if self._device.type == "cpu" else seconds)
        if last:
            self.check()
        # Outputs that contenders allocate must not pile up.
        self._outputs = []


class Measurement:
    """Contenders on one prompt: made ready first, timed after, so that others may use the device until then.

    Attributes:
        results: By contender, complete after the last round.
    """

    def __init__(self, problem: Problem, contenders: Mapping[str, Contender]) -> None:
        """Takes them; nothing runs yet."""
        self.results = {name: Result() for name in contenders}
        self._problem, self._contenders = problem, contenders
        self._references: dict[tuple[Mask, bool], Reference] = {}
        self._runners: dict[str, _Runner] = {}

    def prepare(self, step: Callable[[str], object] = lambda name: None) -> None:
        """Compiles, warms up and checks each; what is wrong or fails takes no part in the rounds.

        Args:
            step: Called with a contender's name before its turn.
        """
        with torch.no_grad():
            for name, contender in self._contenders.items():
                step(name)
                self._attempt(name, functools.partial(self._enter, name, contender))

    def round(self, *, last: bool, step: Callable[[str], object] = lambda name: None) -> None:
        """One sample of each that still takes part.

        Args:
            last: Whether to check the outputs again.
            step: As for ``prepare``.
        """
        with torch.no_grad():
            for name, runner in list(self._runners.items()):
                step(name)
                self._attempt(name, functools.partial(runner.round, last=last))

    def _attempt(self, name: str, call: Callable[[], object]) -> None:
        # Whatever a contender raises, the others go on and the report says why this one has no time.
        try:
            call()
        except Exception as error:
            self.results[name].withdraw("failed", one_line(error))
        if self.results[name].status != "ok":
            self._runners.pop(name, None)

    def _enter(self, name: str, contender: Contender) -> None:
        problem, result = self._problem, self.results[name]
        key = mask, fp8 = contender.mask(problem), contender.fp8_products and problem.settings.fp8
        if key not in self._references:
            self._references[key] = make_reference(problem, mask, fp8_products=fp8)
        result.budget = self._references[key].budget
        runner = _Runner(contender.prepare(problem), self._references[key], result, problem.q.device)
        self._runners[name] = runner
        problem.out.fill_(torch.nan)
        runner.warm_up()


def measure(problem: Problem, contenders: Mapping[str, Contender], *, repeats: int) -> dict[str, Result]:
    """Times the contenders, A B C A B C; each is checked before its first timed round and after its last."""
    measurement = Measurement(problem, contenders)
    total = len(contenders) * (1 + repeats)
    with tqdm(total=total, unit="run", desc=f"{problem.length} tokens", leave=False) as bar:

        def step(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        measurement.prepare(step)
        for repeat in range(repeats):
            measurement.round(last=repeat == repeats - 1, step=step)
    return measurement.results


def one_line(error: Exception) -> str:
    """An exception's kind and message, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
