"""What a result says of where it comes from: hardware, versions, date, commit."""

from __future__ import annotations

from typing import Any

from vllm_trimix.reporting.tables import cell

BLOCKS = ("environment", "provenance")
KEYS = ("source", "date", "hardware", "versions", "commit", "command", "note")
"""The same facts where a file has them at its top."""


def facts(value: Any) -> dict[str, str]:
    """Fact -> text, of a JSON file; empty if it names none."""
    if not isinstance(value, dict):
        return {}
    found = {}
    for block in (value.get(name) for name in BLOCKS):
        if isinstance(block, dict):
            found.update(block)
    found.update({key: value[key] for key in KEYS if key in value})
    texts = {key: _text(item) for key, item in found.items()}
    return {key: text for key, text in texts.items() if text}


def _text(value: Any) -> str:
    """Empty for what is too long to be a fact: samples."""
    if isinstance(value, dict):
        parts = [f"{key} {cell(item)}" for key, item in value.items() if not isinstance(item, dict | list)]
        return ", ".join(parts)
    if isinstance(value, list):
        return ", ".join(cell(item) for item in value) if all(isinstance(item, str) for item in value) else ""
    return value if isinstance(value, str) else cell(value)


def summary(found: dict[str, str]) -> str:
    """Hardware, date and commit in a line."""
    hardware = next((found[key] for key in ("gpu", "hardware", "device", "cpu") if key in found), "")
    commit = f"commit {found['commit']}" if "commit" in found else ""
    return " · ".join(filter(None, [hardware, found.get("date", ""), commit]))
