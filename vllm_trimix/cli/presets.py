"""``vllm-trimix presets``: the shipped presets and where they come from."""

from __future__ import annotations

import argparse
import json
from typing import Any

from vllm_trimix.config.presets import find_preset, preset_names


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds the command's arguments."""
    parser = subparsers.add_parser(
        "presets",
        help="list the shipped presets, or show one",
        description="Layer sets that come with the package, found by exact HF id, in offline caches too, when a model "
        "is served.",
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="model ids, their triangle layers and sources (the default)")
    show = actions.add_parser("show", help="one preset, as JSON")
    show.add_argument("model", metavar="MODEL", help="HF id")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints presets.

    Raises:
        ValueError: No preset for this model.
    """
    if args.action == "show":
        print(json.dumps(_preset(args.model), indent=2))
        return 0
    width = max(len(name) for name in preset_names())
    for name in preset_names():
        preset = _preset(name)
        layers = preset.get("layers") or f"{preset['starting_layer']}-"
        print(f"{name:{width}}  layers {layers:12}  {preset['provenance']['source']}")
    return 0


def _preset(model: str) -> dict[str, Any]:
    preset = find_preset(model)
    if preset is None:
        raise ValueError(
            f"{model!r} has no shipped preset; there are: {', '.join(preset_names())}. "
            "`vllm-trimix probe MODEL` makes one for any model"
        )
    return preset
