"""Arguments that several commands take, each spelled once, and how they are read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

CAUSAL_MODEL = "HF id or path of a causal language model"


def whole(text: str) -> int:
    """A whole number above 0."""
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def add_model(parser: argparse.ArgumentParser, meaning: str = CAUSAL_MODEL) -> None:
    """``MODEL``."""
    parser.add_argument("model", metavar="MODEL", help=meaning)


def add_directory(parser: argparse.ArgumentParser, kind: str) -> None:
    """``DIR``, where a model of a kind is written."""
    parser.add_argument("directory", type=Path, metavar="DIR", help=f"new directory, or an earlier {kind} model")


def add_output(parser: argparse.ArgumentParser, default: str | None = None, note: str = "") -> None:
    """``--output DIR``, the results' folder."""
    folder = None if default is None else Path(default)
    parser.add_argument("--output", type=Path, default=folder, metavar="DIR", help=f"folder for the results{note}")


def add_trimix(parser: argparse.ArgumentParser, meaning: str, default: str | None = None) -> None:
    """``--trimix JSON``, the entry of a server."""
    parser.add_argument("--trimix", default=default, metavar="JSON", help=meaning)


def add_trust(parser: argparse.ArgumentParser, what: str = "model") -> None:
    """``--trust-remote-code``."""
    parser.add_argument("--trust-remote-code", action="store_true", help=f"run code that comes with the {what}")


def read_json(flag: str, text: str) -> Any:
    """The JSON that a flag was given.

    Raises:
        ValueError: It is none.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {text!r} is not JSON: {error}") from None
