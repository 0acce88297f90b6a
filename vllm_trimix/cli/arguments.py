"""Arguments that several commands take, each spelled once, and how they are read."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
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


def add_tokenizer(parser: argparse.ArgumentParser) -> None:
    """``--tokenizer`` and ``--chat-template-kwargs``: how prompts are made."""
    add = parser.add_argument
    add("--tokenizer", metavar="MODEL", help="HF id or path of another tokenizer, for models without their own")
    add(
        "--chat-template-kwargs",
        metavar="JSON",
        default="{}",
        help="arguments of the chat template, as vLLM takes them; thinking is off unless one of them says otherwise",
    )


def check_output(folder: Path) -> None:
    """Refuses a folder for results that can't be made or written to, before there are any.

    Raises:
        ValueError: Naming what is in the way.
    """
    there = folder.resolve()
    while not there.exists():
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"--output: {there} is no folder; name another one")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--output: {there} can't be written to; name another folder")


def check_packages(*names: str, extra: str = "") -> None:
    """Refuses to begin where a package is missing, even if it is needed only at the end.

    Args:
        *names: Of packages.
        extra: The extra that brings them, all but vLLM.

    Raises:
        ValueError: Naming them.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        ours = f"pip install 'vllm-trimix[{extra}]'" if extra and missing != ["vllm"] else ""
        how = "; ".join(filter(None, [ours, "for vllm see Install in the README" if "vllm" in missing else ""]))
        raise ValueError(f"this command needs {', '.join(missing)}, not installed here: {how}")


def read_object(flag: str, text: str) -> dict[str, Any]:
    """The JSON object that a flag was given.

    Raises:
        ValueError: It is none.
    """
    value = read_json(flag, text)
    if not isinstance(value, dict):
        raise ValueError(f'{flag}: {text!r} is no JSON object; write e.g. {{"enable_thinking": false}}')
    return value


def read_json(flag: str, text: str) -> Any:
    """The JSON that a flag was given.

    Raises:
        ValueError: It is none.
    """
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {text!r} is not JSON: {error}") from None
