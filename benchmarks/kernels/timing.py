"""Times contenders against each other: warm-up, correctness first, then interleaved rounds."""

from __future__ import annotations

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
    # Long enough that the host is ahead of the device when the timed work begins.
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


def measure(problem: Problem, contenders: Mapping[str, Contender], *, repeats: int) -> dict[str, Result]:
    """Times the contenders, A B C A B C; each is checked before its first timed round and after its last."""
    results = {name: Result() for name in contenders}
    references: dict[tuple[Mask, bool], Reference] = {}
    runners: dict[str, _Runner] = {}

    def attempt(name: str, step: Callable[[], object]) -> None:
        # Whatever a contender raises, the others go on and the report says why this one has no time.
        try:
            step()
        except Exception as error:
            results[name].withdraw("failed", one_line(error))
        if results[name].status != "ok":
            runners.pop(name, None)

    def enter(name: str, contender: Contender) -> None:
        result, fp8 = results[name], contender.fp8_products and problem.settings.fp8
        key = mask, _ = contender.mask(problem), fp8
        if key not in references:
            references[key] = make_reference(problem, mask, fp8_products=fp8)
        result.budget = references[key].budget
        runner = runners[name] = _Runner(contender.prepare(problem), references[key], result, problem.q.device)
        problem.out.fill_(torch.nan)
        runner.warm_up()

    bar = tqdm(total=len(contenders) * (1 + repeats), unit="run", desc=f"{problem.length} tokens", leave=False)
    with bar, torch.no_grad():
        for name, contender in contenders.items():
            bar.set_postfix_str(name)
            attempt(name, lambda name=name, contender=contender: enter(name, contender))
            bar.update()
        for repeat in range(repeats):
            for name, runner in list(runners.items()):
                bar.set_postfix_str(name)
                attempt(name, lambda runner=runner, last=repeat == repeats - 1: runner.round(last=last))
                bar.update()
    return results


def one_line(error: Exception) -> str:
    """An exception's kind and message, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}"
