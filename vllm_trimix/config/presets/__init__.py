"""Shipped presets: triangle layers of known models, with their provenance, found by exact HF id."""

from __future__ import annotations

import json
from functools import cache
from importlib import resources
from typing import Any


@cache
def _presets() -> dict[str, dict[str, Any]]:
    """Every shipped preset by each model id it names."""
    found: dict[str, dict[str, Any]] = {}
    for file in resources.files(__name__).iterdir():
        if file.name.endswith(".json"):
            preset = json.loads(file.read_text())
            models = preset.pop("models")
            found.update(dict.fromkeys(models, preset))
    return found


def find_preset(model: str) -> dict[str, Any] | None:
    """The shipped preset for exactly this HF id, or None.

    Returns:
        The ``trimix`` keys plus ``provenance`` and ``shape``.
    """
    return _presets().get(model)


@cache
def preset_shapes() -> dict[str, dict[str, Any]]:
    """The shape of the model of every shipped preset, by the model's first id; sorted."""
    files = {id(preset): (name, preset["shape"]) for name, preset in reversed(_presets().items())}
    return dict(sorted(files.values(), key=lambda item: item[0]))


def preset_names() -> list[str]:
    """Model ids that have a shipped preset, sorted."""
    return sorted(_presets())
