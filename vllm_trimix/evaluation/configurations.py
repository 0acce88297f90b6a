"""The configurations that are compared: stock vLLM, the model's own preset, preset files, entries, and ablations."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_trimix.config.entry import parse_config

STOCK = "stock"
TRIMIX = "trimix"
NOISE_FLOOR = "noise-floor"
DEFAULT = (STOCK, TRIMIX)


@dataclass(frozen=True)
class Configuration:
    """A named configuration.

    Attributes:
        name: How results call it.
        entry: The ``trimix`` entry; None for stock vLLM.
        ablation: The parameter that it varies, empty for none.
        value: What that parameter is here, as text.
        flags: Engine flags of its own.
    """

    name: str
    entry: dict[str, Any] | None
    ablation: str = ""
    value: str = ""
    flags: tuple[str, ...] = ()

    @property
    def settings(self) -> str:
        """A hash of the entry, and of flags of its own."""
        content = json.dumps(self.entry, sort_keys=True) + "".join(f" {flag}" for flag in self.flags)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def noise_floor(tokens: int) -> Configuration:
    """Stock again, in prompt chunks of so many tokens: what rounding alone changes."""
    return Configuration(NOISE_FLOOR, None, flags=("--max-num-batched-tokens", str(tokens)))


def parse(names: str, entry: dict[str, Any], more: Sequence[str]) -> list[Configuration]:
    """Reads ``--configs`` and ``--config``.

    Args:
        names: ``stock``, ``trimix`` and preset files, commas between.
        entry: The entry of ``trimix``, and what files are put on top of.
        more: ``NAME=JSON``, entries of their own.

    Raises:
        ValueError: An unknown name, a bad entry, a name that is taken, or no ``stock``.
    """
    found: list[Configuration] = []

    def add(configuration: Configuration) -> None:
        if any(configuration.name == other.name for other in found):
            raise ValueError(
                f"--configs: the name {configuration.name!r} is taken; give it once, or under another name"
            )
        found.append(configuration)

    for name in filter(None, (part.strip() for part in names.split(","))):
        if name == STOCK:
            add(Configuration(STOCK, None))
        elif name == TRIMIX:
            add(Configuration(TRIMIX, entry))
        elif Path(name).is_file():
            preset = {key: value for key, value in entry.items() if key not in ("layers", "starting_layer")}
            add(Configuration(Path(name).stem, {**preset, "preset": name}))
        else:
            raise ValueError(
                f"--configs: {name!r} is neither {STOCK}, {TRIMIX} nor a preset file; an entry of your own is "
                "--config NAME=JSON"
            )
    for text in more:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"--config: {text!r} is not NAME=JSON, e.g. wide='{{\"n_local\": 1024}}'")
        add(Configuration(name, read_entry(f"--config {name}", value)))
    if not any(configuration.entry is None for configuration in found):
        raise ValueError(f"--configs: {names!r} has no {STOCK!r}, which the others are compared with; add it")
    # Dense answers come first: agreement is with them, and a stopped evaluation has them.
    return sorted(found, key=lambda configuration: configuration.entry is not None)


def read_entry(flag: str, text: str) -> dict[str, Any]:
    """A ``trimix`` entry from the command line.

    Raises:
        ValueError: Not JSON, or a bad entry.
    """
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {text!r} is not JSON: {error}") from None
    return parse_config(entry).model_dump(exclude_unset=True)
