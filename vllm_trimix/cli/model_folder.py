"""Whether a model that a command was given is there, found out before anything heavy is imported."""

from __future__ import annotations

import os
import re
from pathlib import Path

CONFIG_FILES = ("config.json", "params.json")
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def check_model(model: str) -> None:
    """Checks that a model's folder, or its id in a cache that nothing is added to, is there.

    Args:
        model: HF id or path, as the user wrote it.

    Raises:
        ValueError: It is not there; says which folder or id is missing.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if not any((path / name).is_file() for name in CONFIG_FILES):
            raise ValueError(
                f"MODEL: the folder {str(path)!r} holds no {' or '.join(CONFIG_FILES)}: it is not a model's folder"
            )
        return
    if path.is_file():
        return
    if model.startswith(("/", "./", "../", "~")) or not _ID.fullmatch(model):
        raise ValueError(f"MODEL: there is no folder {model!r}")
    if _offline() and not _ms():
        _check_cache(model)


def _offline() -> bool:
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def _ms() -> bool:
    return os.environ.get("VLLM_USE_MODELSCOPE", "").lower() in ("1", "true")


def _check_cache(model: str) -> None:
    """Of the hub, when there is no network to ask."""
    # Not light, and of vLLM's companions.
    from huggingface_hub import constants, try_to_load_from_cache

    if not any(isinstance(try_to_load_from_cache(model, name), str) for name in CONFIG_FILES):
        raise ValueError(
            f"MODEL: {model!r} is neither a folder here nor in the hub's cache {constants.HF_HUB_CACHE}, and "
            "HF_HUB_OFFLINE forbids to fetch it; name a folder, or fetch it once without HF_HUB_OFFLINE"
        )
