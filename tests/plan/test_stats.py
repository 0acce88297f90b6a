"""What ran, as counted and as logged."""

from __future__ import annotations

import re
import threading

from vllm_trimix.stats import Stats, log_periodically


class Keys:
    """A counter whose totals are set by hand."""

    def __init__(self, read: int, causal: int) -> None:
        self.read, self.causal = read, causal

    def total(self) -> int:
        return self.read


def keys_of(line: str) -> tuple[int, int]:
    found = re.search(r" keys_read=(\d+) keys_causal=(\d+) ", line)
    assert found
    return int(found[1]), int(found[2])


def test_density_is_told_by_interval_and_since_the_start() -> None:
    stats = Stats()
    stats.add({"triangle": 10})
    assert "keys_read" not in stats.line({}, stats.snapshot())
    first, second = Keys(10, 100), Keys(5, 50)
    for counter in (first, second, first):
        stats.watch_keys(counter)
    before = stats.snapshot()
    assert keys_of(stats.line({}, before)) == (15, 150)
    first.read, first.causal = 60, 200
    line = stats.line(before, stats.snapshot())
    assert keys_of(line) == (50, 100)
    # 65 of 250.
    assert " density_since_start=0.260 " in line


def test_what_the_device_reports_late_is_still_logged() -> None:
    stats, keys = Stats(), Keys(0, 100)
    stats.watch_keys(keys)
    stats.add({"triangle": 10})
    lines: list[str] = []
    logged = threading.Event()

    def log(line: str) -> None:
        lines.append(line)
        logged.set()

    log_periodically(stats, 0.01, log)
    assert logged.wait(10)
    logged.clear()
    keys.read = 40
    assert logged.wait(10)
    assert [keys_of(line) for line in lines] == [(0, 100), (40, 0)]
    assert "triangle=0 " in lines[1]
