"""Presets by name, by file, and as overlays of one another."""

from __future__ import annotations

from pathlib import Path

from vllm_trimix.config.entry import TrimixConfig, parse_config
from vllm_trimix.config.presets import find_preset, preset_names
from vllm_trimix.config.shallow import merged_shallow
from vllm_trimix.untrusted import quoted, read_json, reason

MAX_PRESET_BYTES = 2**24
"""Of a preset file; those that the probe writes have some ten thousand."""

MAX_BASES = 16
"""Presets that build on one another."""


def is_preset_file(name: str, folder: Path = Path()) -> bool:
    """Whether a preset's name means a file, seen from ``folder``, rather than a shipped preset."""
    return name.endswith(".json") or (folder / name).is_file()


def named_preset(name: str, *, where: str, folder: Path, above: tuple[Path, ...]) -> tuple[TrimixConfig, str]:
    """Loads a preset and, for an overlay, what it builds on.

    Args:
        name: A shipped preset, or a file seen from ``folder``.
        where: The setting that names it, for errors.
        above: The overlays that led here, outermost first.

    Returns:
        The merged preset, and its name with those of its bases, e.g. ``mine.json+Qwen/Qwen3-8B``.
    """
    try:
        is_file, path = is_preset_file(name, folder), folder / name
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{where}: {quoted(name)} is no path: {reason(error)}") from None
    if not is_file:
        shipped = find_preset(name)
        if shipped is None:
            raise ValueError(
                f"{where}: {quoted(name)} is neither a shipped preset nor a file; shipped: {', '.join(preset_names())}"
            )
        return preset_config(shipped, f"preset {name!r}"), name
    chain = (*above, real)
    if real in above:
        raise ValueError(
            f"{where}: {' -> '.join(quoted(item.name)[1:-1] for item in chain)} is a circle; "
            'one of them must name its "layers" instead of a "base"'
        )
    if len(chain) > MAX_BASES:
        raise ValueError(f"{where}: {quoted(name)} is one preset too many: at most {MAX_BASES} build on one another")
    label = f"preset file {quoted(str(path))}"
    entry = read_json(path, f"{where}: cannot read {quoted(str(path))}", max_bytes=MAX_PRESET_BYTES)
    entry = _with_own_files(entry, real.parent)
    if not isinstance(entry, dict) or "base" not in entry:
        return preset_config(entry, label), path.name
    base = entry["base"]
    if not isinstance(base, str) or not base:
        raise ValueError(
            f"{label}: base: {quoted(base)} is not valid: should be a shipped preset or the path of a preset file"
        )
    own = preset_config({key: value for key, value in entry.items() if key != "base"}, label)
    # Read at its real place, so that a link to an overlay still finds the base beside it.
    below, below_name = named_preset(base, where=f"{label}: base", folder=real.parent, above=chain)
    return _overlaid(own, below), f"{path.name}+{below_name}"


def _with_own_files(entry: object, folder: Path) -> object:
    """A preset file's entry, with the head file that it names seen from its own folder."""
    if isinstance(entry, dict):
        shallow = entry.get("shallow")
        if isinstance(shallow, dict) and isinstance(shallow.get("heads"), str):
            return {**entry, "shallow": {**shallow, "heads": str(folder / shallow["heads"])}}
    return entry


def _overlaid(own: TrimixConfig, below: TrimixConfig) -> TrimixConfig:
    """The keys of ``below``, with those that ``own`` sets in their place."""
    mine = {key: value for key, value in own if value is not None}
    kept = {key: value for key, value in below if value is not None}
    if "layers" in mine or "starting_layer" in mine:
        # Two spellings of one setting.
        kept.pop("layers", None)
        kept.pop("starting_layer", None)
    shallow = merged_shallow(own.shallow, below.shallow)
    return TrimixConfig.model_validate({**kept, **mine, **({} if shallow is None else {"shallow": shallow})})


def preset_config(entry: object, name: str) -> TrimixConfig:
    """A preset is what a model needs, plus what only says where it comes from and which models it is for."""
    settings = entry
    if isinstance(entry, dict):
        settings = {key: value for key, value in entry.items() if key not in ("provenance", "models", "shape")}
        server_keys = [key for key in ("preset", "prompt_logprobs", "stats_log_interval") if key in settings]
        if server_keys:
            raise ValueError(
                f"{name}: {server_keys[0]!r} is a setting of the server, not of a model; move it to trimix"
            )
    try:
        return parse_config(settings)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
