"""Data from the network: whether it can be reached, found out once and within seconds."""

from __future__ import annotations

import contextlib
import functools
import io
import logging
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from vllm_trimix.evaluation.suite import Unavailable

_SECONDS = 5


def offline() -> bool:
    """Whether the user forbids the network, by the variables of the hub's client and of ``datasets``."""
    names = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")
    return any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in names)


@cache
def reachable(address: str) -> bool:
    """Whether somebody answers at an address, by way of the user's proxy if there is one."""
    if offline():
        return False
    found: list[bool] = []

    def ask() -> None:
        request = urllib.request.Request(address, method="HEAD")
        try:
            urllib.request.urlopen(request, timeout=_SECONDS).close()
        except urllib.error.HTTPError:
            found.append(True)
        except (OSError, ValueError):
            found.append(False)
        else:
            found.append(True)

    # Looking up a name has no time limit of its own.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(_SECONDS + 1)
    return found == [True]


def once(load: Callable[..., Any]) -> Callable[..., Any]:
    """Loads what its arguments name once, quietly; what failed isn't tried again, but raises Unavailable."""

    @cache
    def outcome(*names: str) -> tuple[Any, str]:
        try:
            with silence():
                return load(*names), ""
        except Exception as error:
            return None, (str(error).strip() or type(error).__name__).splitlines()[0]

    @functools.wraps(load)
    def loaded(*names: str) -> Any:
        value, failure = outcome(*names)
        if failure:
            raise Unavailable(failure)
        return value

    return loaded


@once
def dataset(name: str, split: str, column: str) -> list[str]:
    """A column of a data set of the Hugging Face hub, or of its copy on this machine."""
    if not offline():
        # Of the extra `eval`.
        from huggingface_hub import constants

        if not reachable(constants.ENDPOINT):
            raise Unavailable(f"{name}: {constants.ENDPOINT} can't be reached")
    # Of the extra `eval`.
    import datasets

    rows: list[str] = datasets.load_dataset(name, split=split)[column][:]
    return rows


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Keeps what others print, log and draw off the user's terminal."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
