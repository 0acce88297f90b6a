"""The configurations that a benchmark compares: stock, TRIMIX, rows and further ones by name, and the floor."""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.models import read_config
from benchmarks.serving.rows import PUBLISHED_ROWS
from vllm_trimix.config.entry import Resolved, parse_config
from vllm_trimix.config.resolve import resolve

STOCK = "stock"
TRIMIX = "trimix"
IDEAL = "ideal"
STATS_SECONDS = 1.0
"""Between the log lines of servers whose counters are read."""

PATTERNS = {"minference": "vertical_slash", "flexprefill": "flexprefill", "xattention": "xattention"}
ROWS = tuple(PATTERNS) + tuple(f"{TRIMIX}+{name}" for name in PATTERNS)
"""Named configurations: a dynamic pattern in all layers, or in those that the triangle leaves dense."""
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

    def counted(self) -> Configuration:
        """The same, with the counters in the log often enough to be read after each request."""
        if self.trimix is None:
            return self
        return dataclasses.replace(self, trimix={**self.trimix, "stats_log_interval": STATS_SECONDS})


def configurations(
    trimix: str, more: Sequence[str], *, ideal: bool, rows: str = "", shallow: str = "{}"
) -> list[Configuration]:
    """Stock, TRIMIX, the named rows, the further ones, and the floor of TRIMIX.

    Args:
        trimix: The ``trimix`` entry, JSON.
        more: ``NAME=JSON``; null is stock.
        ideal: Whether to add the floor.
        rows: Names of ``ROWS`` with commas between, or ``published``.
        shallow: Keys of every row's ``shallow`` entry, JSON.

    Raises:
        ValueError: Malformed JSON, a bad entry, or a name that is taken.
    """
    entry = _entry("--trimix", trimix)
    if entry is None:
        raise ValueError("--trimix: null is stock vLLM, which is there already; give an entry")
    found = [Configuration(STOCK, None), Configuration(TRIMIX, entry), *_rows(rows, entry, shallow)]
    for text in more:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[\w.+-]+", name):
            raise ValueError(f"--config: {text!r} is not NAME=JSON, e.g. wide='{{\"n_local\": 1024}}'")
        if name == IDEAL or name in (configuration.name for configuration in found):
            raise ValueError(f"--config: the name {name!r} is taken; choose another")
        found.append(Configuration(name, _entry(f"--config {name}", value)))
    if ideal:
        # Without dense last rows every prompt row of a triangle layer is left out.
        floor = {**entry, "last_n": 0, "min_prompt_len": 0}
        extension = "--worker-extension-cls=benchmarks.serving.ideal.LeaveOutTriangle"
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
        num_heads=config["num_attention_heads"],
        text_config=SimpleNamespace(**config),
    )


def _rows(names: str, entry: dict[str, Any], shallow: str) -> list[Configuration]:
    try:
        keys = json.loads(shallow)
    except ValueError as error:
        raise ValueError(f"--shallow: {shallow!r} is not JSON ({error})") from None
    if not isinstance(keys, dict) or "pattern" in keys or "heads" in keys:
        raise ValueError(
            f"--shallow: {shallow!r} is not an object of keys that every row's pattern has, e.g. "
            "'{\"min_seq_len\": 0}'; a row of your own is --config NAME=JSON"
        )
    found = []
    for name in PUBLISHED_ROWS if names == "published" else dict.fromkeys(filter(None, names.split(","))):
        if name not in ROWS:
            near = difflib.get_close_matches(name, ROWS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"--rows: {name!r} is not a row{hint} (rows: published, {', '.join(ROWS)})")
        alone = not name.startswith(TRIMIX)
        kept = {key: value for key, value in entry.items() if not (alone and key in ("starting_layer", "layers"))}
        pattern = PATTERNS[name.removeprefix(f"{TRIMIX}+")]
        row = {**kept, **({"layers": []} if alone else {}), "shallow": {"pattern": pattern, **keys}}
        found.append(Configuration(name, row))
    return found


def _entry(flag: str, text: str) -> dict[str, Any] | None:
    try:
        entry = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{flag}: {text!r} is not JSON ({error})") from None
    if entry is not None:
        parse_config(entry)
    return entry
