"""The preset overlay that records a measured break-even."""

from __future__ import annotations

import json
import os
import re
import tempfile
from pathlib import Path
from typing import Any

from vllm_trimix.config.entry import Resolved, TrimixConfig
from vllm_trimix.config.layers import format_layers
from vllm_trimix.config.preset_files import is_preset_file

SOURCE = "vllm-trimix calibrate"
# Keys of the user's entry that belong to the server, not to a preset.
SERVER_KEYS = ("prompt_logprobs", "stats_log_interval")


def check_output(output: Path) -> None:
    """Refuses, before anything is measured, a place where the overlay can't be written.

    Raises:
        ValueError: No ``.json`` name, or a file that ``calibrate`` did not write.
        OSError: The folder is missing or can't be written to.
    """
    if output.suffix != ".json":
        raise ValueError(f"--output: {str(output)!r} must end in .json, by which a preset is known to be a file")
    if output.exists() and not is_overlay(output):
        raise ValueError(f"--output: {str(output)!r} exists and is not an overlay of {SOURCE}; choose another name")
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise OSError(f"--output: cannot write to the folder {str(output.parent)!r}: {error.strerror}") from None


def is_overlay(path: Path) -> bool:
    """Whether a file is an overlay that ``calibrate`` wrote."""
    try:
        return bool(json.loads(path.read_text())["provenance"]["source"] == SOURCE)
    except (OSError, ValueError, LookupError, TypeError):
        return False


def check_base(entry: TrimixConfig, output: Path) -> None:
    """Refuses to write an overlay over the preset that it builds on.

    Raises:
        ValueError: They are one file.
    """
    name = entry.preset
    if name is not None and is_preset_file(name) and Path(name).resolve() == output.resolve():
        raise ValueError(
            f"--output: {str(output)!r} is the preset that is measured, and would build on itself; choose another name"
        )


def make_overlay(
    entry: TrimixConfig,
    resolved: Resolved,
    *,
    min_prompt_len: int | None,
    min_seq_len: int | None = None,
    output: Path,
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """The preset overlay.

    It builds on the preset that named the layers, and holds what the user's own entry set. Where there was no preset
    (layers from the entry or from the model's config.json), it holds all that ran.

    Args:
        entry: The user's ``trimix`` entry.
        resolved: What ran.
        min_prompt_len: The triangle's break-even, in tokens; None where no layer is a triangle layer.
        min_seq_len: The dynamic pattern's, in tokens; None: the overlay leaves the shallow layers dense.
        output: Where the overlay will lie; a base file or head file beside it is named relative to it.
        provenance: How it was measured.
    """
    own = (*SERVER_KEYS, "preset", "shallow")
    keys = {key: value for key, value in entry if value is not None and key not in own}
    if resolved.source.startswith("preset:"):
        named = entry.preset
        base = resolved.source.removeprefix("preset:") if named is None else _base_name(named, output)
        keys = {"base": base, **keys}
    else:
        keys = {
            "layers": format_layers(resolved.layers) if resolved.layers else "",
            "n_init": resolved.n_init,
            "n_local": resolved.n_local,
            "last_n": resolved.last_n,
            **({} if resolved.dense_backend is None else {"dense_backend": resolved.dense_backend}),
        }
    if min_prompt_len is not None:
        keys["min_prompt_len"] = min_prompt_len
    if resolved.shallow is not None:
        kept = {} if min_seq_len is None else overlay_shallow(entry, resolved, output)
        keys["shallow"] = "dense" if min_seq_len is None else {**kept, "min_seq_len": min_seq_len}
    elif entry.shallow is not None:
        keys["shallow"] = entry.shallow
    return {**keys, "provenance": provenance}


def overlay_shallow(entry: TrimixConfig, resolved: Resolved, output: Path) -> dict[str, Any]:
    """What the overlay's ``shallow`` holds besides the break-even: of a preset's pattern only what the user changed.

    Raises:
        ValueError: Nobody named the head file in a place that the overlay could refer to.
    """
    own = dict(entry.shallow) if isinstance(entry.shallow, dict) else {}
    if "heads" in own:
        own["heads"] = _seen_from(Path(own["heads"]), output)
    if resolved.source.startswith("preset:") or {"pattern", "heads"} & own.keys():
        return own
    shallow = resolved.shallow
    assert shallow is not None
    if shallow.heads:
        raise ValueError(
            f"--trimix: the head file {shallow.source} is named by a preset whose layers are not used, or by the "
            'model\'s config.json; name it here as well: {"shallow": {"heads": FILE}}'
        )
    return {**shallow.patterns[0], "layers": format_layers(shallow.layers), "last_n": shallow.last_n}


def _base_name(name: str, output: Path) -> str:
    return _seen_from(Path(name), output) if is_preset_file(name) else name


def _seen_from(path: Path, output: Path) -> str:
    """A file under the overlay's folder moves with it; another one stays where it is."""
    path, folder = path.resolve(), output.resolve().parent
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def write_overlay(overlay: dict[str, Any], output: Path) -> None:
    """Writes the file whole or not at all."""
    part = output.with_name(f".{output.name}.part")
    try:
        # Lists of numbers on one line each.
        text = re.sub(r"\[[\s\d.,]+\]", lambda match: " ".join(match[0].split()), json.dumps(overlay, indent=1))
        part.write_text(text + "\n")
        os.replace(part, output)
    finally:
        part.unlink(missing_ok=True)
