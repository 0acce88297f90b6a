"""Which shipped preset a model is: by the id that its name or its place in a cache gives, or proposed by its shape.

People without a network serve folders: vLLM replaces an id by its snapshot in the hub's cache when ``HF_HUB_OFFLINE``
is set, and ModelScope keeps models by id too. Any other folder says nothing about where its weights come from: its
shape names the presets that may fit, and the user decides.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vllm_trimix.config.context import rope_types
from vllm_trimix.config.presets import find_preset, preset_shapes

_TELLS = ("rope_type",)
"""Facts of a shape that only tell presets of one shape apart: a fine-tune may change them."""


def known_id(model: str) -> str | None:
    """The id under which a shipped preset knows this model, or None.

    Args:
        model: An id, or a path; the id of a path is what the layout of the hub's or ModelScope's cache says.
    """
    return next((name for name in _ids(model) if find_preset(name) is not None), None)


def _ids(model: str) -> Iterator[str]:
    yield model
    seen = [Path(model).parts]
    try:
        # A link to a snapshot is that snapshot.
        seen.append(Path(model).resolve().parts)
        seen.append(Path(model).expanduser().parts)
    except (OSError, RuntimeError, ValueError):
        pass
    for parts in seen:
        yield from _cached_ids(parts)


def _cached_ids(parts: tuple[str, ...]) -> Iterator[str]:
    """Ids by the layout of a cache, the innermost first."""
    for place in reversed(range(len(parts))):
        # The hub's, which newer versions of ModelScope share: models--ORG--NAME/snapshots/HASH[/...].
        kind, *names = parts[place].split("--")
        if kind == "models" and names and parts[place + 1 : place + 2] == ("snapshots",):
            yield _undotted("/".join(names))
    root = os.environ.get("MODELSCOPE_CACHE")
    roots = [Path(root).expanduser().parts] if root else []
    starts = [len(own) for own in roots if parts[: len(own)] == own]
    starts += [place + 1 for place, part in enumerate(parts) if part == "modelscope"]
    for start in starts:
        # hub/ORG/NAME, hub/models/ORG/NAME, models/ORG/NAME, ORG/NAME; NAME/snapshots/... and NAME/REVISION below it.
        rest = parts[start:]
        for folder in ("hub", "models"):
            rest = rest[1:] if rest[:1] == (folder,) else rest
        # models--ORG--NAME and ORG--NAME are newer.
        names = rest[0].removeprefix("models--").split("--") if rest else []
        if len(names) == 2:
            yield _undotted("/".join(names))
        elif len(rest) >= 2:
            yield _undotted("/".join(rest[:2]))


def _undotted(name: str) -> str:
    """ModelScope writes the dots of a name as three underscores: a folder of Python code can't have any."""
    return name.replace("___", ".")


def proposal(text_config: Any) -> str | None:
    """What to tell a user whose model no preset knows, from its shape; None: it is like no preset's model.

    Args:
        text_config: The model's configuration of its text part, of transformers.
    """
    facts = _facts(text_config)
    shapes = preset_shapes()
    fitting = [name for name, shape in shapes.items() if not _differences(shape, facts)]
    if fitting:
        best = max(_tells(shapes[name], facts) for name in fitting)
        first, *others = [name for name in fitting if _tells(shapes[name], facts) == best]
        entry = f'--additional-config \'{{"trimix": {{"preset": "{first}"}}}}\''
        also = f" (or of {', '.join(others)})" if others else ""
        return f"It has the shape of {first}{also}: if it was made from that model, take its preset: {entry}"
    for name, shape in shapes.items():
        if all(facts.get(key) == shape[key] for key in ("model_type", "num_hidden_layers")):
            key, here, there = _differences(shape, facts)[0]
            return f"The preset of {name} is for another model: its {key} is {there}, here it is {here}"
    return None


def _facts(text_config: Any) -> dict[str, Any]:
    heads = getattr(text_config, "num_attention_heads", None)
    names = ("model_type", "num_hidden_layers", "hidden_size", "intermediate_size")
    return {
        **{name: getattr(text_config, name, None) for name in names},
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(text_config, "num_key_value_heads", None) or heads,
        "rope_type": next(iter(rope_types(text_config)), "default"),
    }


def _differences(shape: Mapping[str, Any], facts: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """What of a preset's shape the model doesn't have: the fact, the model's and the preset's."""
    wanted = {key: value for key, value in shape.items() if key not in ("source", *_TELLS)}
    return [(key, facts.get(key), value) for key, value in wanted.items() if facts.get(key) != value]


def _tells(shape: Mapping[str, Any], facts: Mapping[str, Any]) -> int:
    return sum(shape.get(key) == facts.get(key) for key in _TELLS)
