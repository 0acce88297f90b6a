"""Attributes every instant of a profiled request to one category, from the Chrome trace that torch.profiler exports.

On a CPU the engine's thread decides: the innermost range of ``CATEGORIES`` that is open, else ``linear`` inside a
matrix product of PyTorch's, vLLM's or oneDNN's, else ``other``. On CUDA the device decides while it works, and the
engine's thread while it idles. Every instant counts once, so the categories sum to the request's time exactly.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

CATEGORIES = ("linear", "dense attention", "triangle body", "tail", "plan", "scheduler", "other")
# What the engine's thread may be charged for while the device has nothing to do; the rest is ``other``.
_IDLE_CATEGORIES = ("plan", "scheduler")

_PREFIX = "breakdown: "
REQUEST = _PREFIX + "request"
"""The range around the one request that is attributed."""
STEP = _PREFIX + "step"
"""The range around each of its engine steps."""
IDLE = "(device idle)"
NO_OP = "(outside operators)"

_HOST_KINDS = ("cpu_op", "user_annotation")
_LAUNCH_KINDS = ("cuda_runtime", "cuda_driver")
_KERNEL_KINDS = ("kernel",)
_COPY_KINDS = ("gpu_memcpy", "gpu_memset")

# e.g. aten::addmm, aten::linear, _C::onednn_mm, _C::weight_packed_linear, mkldnn::_linear_pointwise, _C::marlin_gemm
_LINEAR_OP = re.compile(r"[:_](?:b|add|baddb)?mm(?:_|$)|linear(?!_att)|gemm|matmul|fused_experts")
# In this order: FlashAttention's kernels for Hopper carry "cutlass" in their names.
_KERNEL_NAMES = (
    (re.compile(r"triangle_prefill|merge_partials"), "triangle body"),
    (re.compile(r"flash|fmha|unified_attention|paged_attention|PrefillWith|DecodeWith", re.I), "dense attention"),
    (re.compile(r"nvjet|gemm|gemv|cutlass|xmma|cublas|splitKreduce|marlin|machete|fused_moe", re.I), "linear"),
)


def range_name(category: str) -> str:
    """The name of the profiler range that charges what runs under it to ``category``."""
    assert category in CATEGORIES
    return _PREFIX + category


_RANGES = {range_name(category): category for category in CATEGORIES}


@dataclass
class Attribution:
    """Where one request's time went.

    Attributes:
        device: ``cuda`` when kernels ran inside the request, else ``cpu``.
        window_ns: The request's time.
        nanoseconds: By category, each of them present; the sum is ``window_ns``.
        ranges: How many ranges of each category began on the host.
        steps: Engine steps.
        other: What ``other`` consists of, by innermost operator or kernel.
    """

    device: str
    window_ns: int
    nanoseconds: dict[str, int]
    ranges: dict[str, int]
    steps: int
    other: dict[str, int]


@dataclass(frozen=True, eq=False, slots=True)
class _Event:
    """A complete event, [start, end) in nanoseconds.

    Attributes:
        line: Host thread, or device and stream.
        correlation: Shared by a launch and what it launched; 0 when the trace has none.
    """

    kind: str
    name: str
    start: int
    end: int
    line: tuple[Any, Any]
    correlation: int


@dataclass(frozen=True)
class _Label:
    """What a host thread or an annotation says of an instant: ``category`` is None where it says nothing."""

    category: str | None
    name: str


class _Line:
    """Labels of one host thread, or of one stream's annotations, over time."""

    def __init__(self, events: Iterable[_Event]) -> None:
        self._starts: list[int] = []
        self._labels: list[_Label] = []
        for start, _, active in _sweep(events):
            self._starts.append(start)
            self._labels.append(_label(active))

    def at(self, time: int) -> _Label:
        """The label of one instant."""
        index = bisect_right(self._starts, time) - 1
        return self._labels[index] if index >= 0 else _Label(None, NO_OP)

    def between(self, start: int, end: int) -> Iterator[tuple[int, _Label]]:
        """The labels of [start, end), each with its nanoseconds."""
        index = bisect_right(self._starts, start)
        for boundary in (*self._starts[index : bisect_right(self._starts, end - 1)], end):
            yield boundary - start, self.at(start)
            start = boundary


def attribute(trace: dict[str, Any]) -> Attribution:
    """Attributes the time of the one request in a trace.

    Args:
        trace: The JSON that ``torch.profiler.profile.export_chrome_trace`` writes.

    Raises:
        ValueError: The trace holds no request, or more than one.
    """
    events = list(_events(trace))
    requests = [event for event in events if event.kind == "user_annotation" and event.name == REQUEST]
    if len(requests) != 1:
        raise ValueError(f"trace: {len(requests)} ranges named {REQUEST!r}; profile exactly one request")
    window = requests[0]
    threads: dict[tuple[Any, Any], list[_Event]] = defaultdict(list)
    device = []
    for event in events:
        if event.kind in _HOST_KINDS:
            threads[event.line].append(event)
        elif event.kind in _KERNEL_KINDS + _COPY_KINDS and event.start < window.end and event.end > window.start:
            device.append(event)
    hosts = {line: _Line(members) for line, members in threads.items()}
    engine = hosts[window.line]
    charged: Counter[tuple[str, str]] = Counter()
    if device:
        labels = _device_labels(events, device, hosts)
        for start, end, active in _sweep(device, window.start, window.end):
            if active:
                running = labels[_deciding(active, labels)]
                charged[running.category or "other", running.name] += end - start
                continue
            for duration, waiting in engine.between(start, end):
                category = waiting.category if waiting.category in _IDLE_CATEGORIES else "other"
                charged[category, IDLE] += duration
    else:
        for duration, found in engine.between(window.start, window.end):
            charged[found.category or "other", found.name] += duration
    inside = Counter(
        event.name for event in events if event.kind == "user_annotation" and window.start <= event.start < window.end
    )
    nanoseconds = dict.fromkeys(CATEGORIES, 0)
    for (category, _), duration in charged.items():
        nanoseconds[category] += duration
    return Attribution(
        device="cuda" if device else "cpu",
        window_ns=window.end - window.start,
        nanoseconds=nanoseconds,
        ranges={category: inside[range_name(category)] for category in CATEGORIES},
        steps=inside[STEP],
        other={name: duration for (category, name), duration in charged.most_common() if category == "other"},
    )


def _events(trace: dict[str, Any]) -> Iterator[_Event]:
    for raw in trace["traceEvents"]:
        if raw.get("ph") == "X" and "ts" in raw:
            # Microseconds with three decimals.
            start = round(1000 * raw["ts"])
            yield _Event(
                kind=raw.get("cat", ""),
                name=raw["name"],
                start=start,
                end=start + round(1000 * raw.get("dur", 0)),
                line=(raw.get("pid"), raw.get("tid")),
                correlation=(raw.get("args") or {}).get("correlation") or 0,
            )


def _sweep(
    events: Iterable[_Event], start: int | None = None, end: int | None = None
) -> Iterator[tuple[int, int, list[_Event]]]:
    """Cuts time where an event begins or ends: (from, to, open events in the order they began).

    Events may overlap in any way. With ``start`` and ``end``, all of that time is covered, else up to the last event.
    """
    marks: list[tuple[int, int, int, _Event]] = []
    for event in events:
        first = event.start if start is None else max(event.start, start)
        last = event.end if end is None else min(event.end, end)
        if first < last:
            # Ends come before begins, and of two that begin together the longer is the outer one.
            marks += ((first, 1, -event.end, event), (last, 0, 0, event))
    marks.sort(key=lambda mark: mark[:3])
    active: list[_Event] = []
    now = start
    for time, begins, _, event in marks:
        if now is not None and time > now:
            yield now, time, active
        now = time
        if begins:
            active.append(event)
        else:
            active.remove(event)
    if now is not None and (end is None or now < end):
        # Without an end: the start of the time in which nothing is open any more.
        yield now, now if end is None else end, active


def _label(active: list[_Event]) -> _Label:
    """The innermost range decides, else any enclosing matrix product."""
    innermost = next((event.name for event in reversed(active) if not event.name.startswith(_PREFIX)), NO_OP)
    for event in reversed(active):
        if event.name in _RANGES:
            return _Label(_RANGES[event.name], innermost)
    if any(event.kind == "cpu_op" and _LINEAR_OP.search(event.name) for event in active):
        return _Label("linear", innermost)
    return _Label(None, innermost)


def _device_labels(
    events: list[_Event], device: list[_Event], hosts: dict[tuple[Any, Any], _Line]
) -> dict[_Event, _Label]:
    """The category of each kernel and copy: that of its launch, of the annotation around it, or of its name.

    The launch comes first because it is exact: an annotation on the device covers everything between the first and the
    last kernel launched under it. Graph replays have launches that say nothing.
    """
    launches = {event.correlation: event for event in events if event.kind in _LAUNCH_KINDS and event.correlation}
    annotations: dict[tuple[Any, Any], list[_Event]] = defaultdict(list)
    for event in events:
        if event.kind == "gpu_user_annotation":
            annotations[event.line].append(event)
    streams = {line: _Line(members) for line, members in annotations.items()}
    labels = {}
    for event in device:
        category = None
        launch = launches.get(event.correlation)
        if launch is not None and launch.line in hosts:
            category = hosts[launch.line].at(launch.start).category
        if category is None and event.line in streams:
            category = streams[event.line].at(event.start).category
        if category is None:
            category = next((found for pattern, found in _KERNEL_NAMES if pattern.search(event.name)), None)
        labels[event] = _Label(category, event.name)
    return labels


def _deciding(running: list[_Event], labels: dict[_Event, _Label]) -> _Event:
    """Of what runs at once on several streams: kernels before copies, then named ones, then the earliest begun."""
    return min(running, key=lambda event: (event.kind in _COPY_KINDS, labels[event].category is None, event.start))
