"""The configurations that a benchmark compares: stock, TRIMIX, further ones by name, and the floor."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.models import read_config
from vllm_trimix.config import Resolved, parse_config, resolve

STOCK = "stock"
TRIMIX = "trimix"
IDEAL = "ideal"
IDEAL_PROOF = "BENCHMARK FLOOR: prefill attention of triangle layers is left out"


@dataclasses.dataclass(frozen=True)
class Configuration:
    """A named server configuration.

    Attributes:
        name: How results call it.
        trimix: The ``trimix`` entry; None serves stock vLLM with the plugin not loaded.
        arguments: More ``vllm serve`` arguments.
        proof: Text that its log must contain before it may be timed.
    """

    name: str
    trimix: dict[str, Any] | None
    arguments: tuple[str, ...] = ()
    proof: str = ""


def configurations(trimix: str, more: Sequence[str], *, ideal: bool) -> list[Configuration]:
    """Stock, TRIMIX, the further ones, and the floor of TRIMIX.

    Args:
        trimix: The ``trimix`` entry, JSON.
        more: ``NAME=JSON``; null is stock.
        ideal: Whether to add the floor.

    Raises:
        ValueError: Malformed JSON, a bad entry, or a name that is taken.
    """
    entry = _entry("--trimix", trimix)
    if entry is None:
        raise ValueError("--trimix: null is stock vLLM, which is there already; give an entry")
    found = [Configuration(STOCK, None), Configuration(TRIMIX, entry)]
    for text in more:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[\w.-]+", name):
            raise ValueError(f"--config: {text!r} is not NAME=JSON, e.g. wide='{{\"n_local\": 1024}}'")
        if name == IDEAL or name in (configuration.name for configuration in found):
            raise ValueError(f"--config: the name {name!r} is taken; choose another")
        found.append(Configuration(name, _entry(f"--config {name}", value)))
    if ideal:
        # Without dense last rows every prompt row of a triangle layer is left out.
        floor = {**entry, "last_n": 0, "min_prompt_len": 0}
        extension = "--worker-extension-cls=benchmarks.ideal.LeaveOutTriangle"
        found.append(Configuration(IDEAL, floor, (extension,), IDEAL_PROOF))
    return found


def resolved_settings(configuration: Configuration, model: Path) -> Resolved | None:
    """What the server of this configuration will run; None for stock.

    Raises:
        ValueError: The entry doesn't fit the model.
    """
    if configuration.trimix is None:
        return None
    config = read_config(model)
    return resolve(
        configuration.trimix,
        model=str(model),
        num_layers=config["num_hidden_layers"],
        model_entry=config.get("trimix"),
    )


def _entry(flag: str, text: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {text!r} is not JSON ({error})") from None
    if entry is not None:
        parse_config(entry)
    return entry
