"""Tiers of the test matrix: the options that choose one and ask for all its cases, and the record of what ran.

pytest-xdist runs test files side by side: its workers share the cores, and the main process adds up what they checked.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Generator
from typing import Any

import pytest

from tests.tiers import TIERS, Tier, write

_TIERS = pytest.StashKey[dict[str, Tier]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="all cases of each tier, not a sample")
    parser.addoption("--tier", choices=(*TIERS, "none"), help="the tests of this tier alone; none: those of no tier")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TIERS] = {}
    _give_children_their_signals_back()
    if _is_worker(config):
        # Before torch is imported. Threads that spin while they wait for one another would take the others' cores.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def _give_children_their_signals_back() -> None:
    """A background job of a script ignores SIGINT, one of nohup SIGHUP, and so would every child: tests send both.

    A handler does not survive an exec, unlike SIG_IGN: children start with the default, this process goes on ignoring.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda *_: None)


def _is_worker(config: pytest.Config) -> bool:
    return hasattr(config, "workerinput")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    chosen = config.getoption("--tier")
    if chosen is None:
        return
    kept: list[pytest.Item] = []
    dropped: list[pytest.Item] = []
    for item in items:
        marker = item.get_closest_marker("tier")
        (kept if (marker.args[0] if marker else "none") == chosen else dropped).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=dropped)


def _tier(config: pytest.Config, name: str) -> Tier:
    return config.stash[_TIERS].setdefault(name, Tier(name, full=config.getoption("--full")))


def _tier_of(item: pytest.Item) -> Tier | None:
    marker = item.get_closest_marker("tier")
    if marker is None:
        return None
    name = marker.args[0]
    if name not in TIERS:
        raise pytest.UsageError(f"{item.nodeid}: tier {name!r} is none of {', '.join(TIERS)}")
    return _tier(item.config, name)


@pytest.fixture
def tier(request: pytest.FixtureRequest) -> Tier:
    """The tier that the test is marked with."""
    found = _tier_of(request.node)
    assert found is not None, "the test carries no tier marker"
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    tier = _tier_of(item)
    if tier is not None:
        tier.seconds += report.duration
        tier.failures += report.failed
    return report


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """What an xdist worker checked; nothing where it crashed."""
    for name, packed in getattr(node, "workeroutput", {}).get("tiers", {}).items():
        _tier(node.config, name).add(packed)


def pytest_sessionfinish(session: pytest.Session) -> None:
    tiers = session.config.stash[_TIERS]
    if _is_worker(session.config):
        session.config.workeroutput["tiers"] = {name: tier.pack() for name, tier in tiers.items()}  # type: ignore[attr-defined]
    elif tiers:
        write(session.config.rootpath / "build" / "tiers.json", tiers)
