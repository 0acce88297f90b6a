"""What ran: query rows by class, counted on the host once a step, and the log line that says so."""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

BY_RULE = ("triangle", "dynamic", "last_n", "decode", "few_keys", "cached")
TOTALS = ("steps", "triangle_layer_rows", "dynamic_layer_rows", "keys_read", "keys_causal", "tracked_requests")


class Stats:
    """Totals since the engine started. Row classes are those of ``Plan.rows``, plus:

    - ``cached``: prompt rows that a prefix-cache hit or a KV connector made unnecessary;

    Kept apart: ``triangle_layer_rows`` and ``dynamic_layer_rows``, rows times layers that the sparse kernels really
    computed; ``keys_read`` and ``keys_causal``, the keys that dynamic patterns read and that dense attention would have
    read in their place, both per tile of rows and head; ``tracked_requests``, the requests known now; ``dynamic_rows``,
    the rows by class in the layers of dynamic patterns, where another rule may hold than in the triangle layers.
    """

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.dynamic_rows: Counter[str] = Counter()
        self.steps = 0
        self.triangle_layer_rows = 0
        self.dynamic_layer_rows = 0
        self._counters: list[Any] = []
        self.tracked_requests = 0
        self._announced: set[str] = set()

    def add(self, rows: Mapping[str, int]) -> list[str]:
        """Adds one step's rows; returns the fallback reasons seen for the first time."""
        self.steps += 1
        self.rows.update(rows)
        return self._fresh(rows)

    def add_dynamic(self, rows: Mapping[str, int]) -> list[str]:
        """Adds one step's rows in the layers of dynamic patterns; returns as ``add``."""
        self.dynamic_rows.update(rows)
        return self._fresh(rows)

    def watch_keys(self, counter: Any) -> None:
        """Adds a group of layers whose read keys are counted."""
        if counter not in self._counters:
            self._counters.append(counter)

    def _fresh(self, rows: Mapping[str, int]) -> list[str]:
        fresh = [reason for reason in rows if reason not in BY_RULE and reason not in self._announced]
        self._announced.update(fresh)
        return fresh

    def snapshot(self) -> dict[str, int]:
        """Totals as plain integers, for tests and logs."""
        return {
            **self.rows,
            "steps": self.steps,
            "triangle_layer_rows": self.triangle_layer_rows,
            "dynamic_layer_rows": self.dynamic_layer_rows,
            "keys_causal": sum(counter.causal for counter in self._counters),
            "keys_read": sum(counter.total() for counter in self._counters),
            "tracked_requests": self.tracked_requests,
        }

    @staticmethod
    def line(since: Mapping[str, int], now: Mapping[str, int]) -> str:
        """The log line: what came between two snapshots, fixed ``key=value`` format."""
        delta = {key: value - since.get(key, 0) for key, value in now.items()}
        dense = {key: delta[key] for key in sorted(now) if key not in (*BY_RULE, *TOTALS) and delta[key]}
        by_rule = " ".join(f"{key}={delta.get(key, 0)}" for key in BY_RULE)
        reasons = ",".join(f"{key}:{value}" for key, value in dense.items()) or "none"
        dynamic = ""
        if now["keys_causal"]:
            density = now["keys_read"] / now["keys_causal"]
            counts = " ".join(f"{key}={delta[key]}" for key in ("dynamic_layer_rows", "keys_read", "keys_causal"))
            dynamic = f"{counts} density_since_start={density:.3f} "
        return (
            f"TRIMIX rows: {by_rule} dense={sum(dense.values())} reasons={reasons} "
            f"triangle_layer_rows={delta['triangle_layer_rows']} {dynamic}requests={now['tracked_requests']}"
        )


def log_periodically(stats: Stats, interval: float, log: Callable[[str], None]) -> None:
    """Logs ``stats.line`` every ``interval`` seconds in which something ran, until ``stats`` is gone."""
    ref = weakref.ref(stats)
    wake = threading.Event()
    weakref.finalize(stats, wake.set)

    def run() -> None:
        last: dict[str, int] = {}
        while not wake.wait(interval):
            current = ref()
            if current is None:
                return
            now = current.snapshot()
            # On a GPU what the last step read is known later than the step.
            if any(now[key] != last.get(key, 0) for key in ("steps", "keys_read")):
                log(current.line(last, now))
                last = now
            del current

    threading.Thread(target=run, name="trimix-stats", daemon=True).start()
