"""What arithmetic allows a stage on its device, to stand beside what it measures (``docs/bounds.md``)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from benchmarks.kernels.prediction import WAYS, device_for, predict_layer, predict_request

# Of the served stage's requests, in the words of the bounds.
_MODES = {"off": "stock", "triangle": "triangle", "on": "triangle+pattern"}
_LAYER = {"num_heads": 32, "num_kv_heads": 8, "head_size": 128}


def layer_seconds(
    environment: Mapping[str, Any], layer: Mapping[str, int], lengths: Iterable[int]
) -> dict[int, dict[str, float]]:
    """Least seconds of one layer by prompt length and way of prefill, dense at its published rate.

    Args:
        environment: Of the stage; ``device_name`` is what PyTorch calls the device.
        layer: Heads, head size and ``chunk``.
        lengths: Prompt tokens.

    Returns:
        Nothing where the device or the layer is none that the bounds know.
    """
    device = device_for(environment.get("device_name", ""))
    if device is None or any(layer[key] != value for key, value in _LAYER.items()):
        return {}
    ways = [way for way in ("dense", *WAYS) if device.capability == 90 or "flash" not in way]
    return {
        length: {way: predict_layer(device.name, length, layer["chunk"], way).seconds for way in ways}
        for length in lengths
    }


def request_seconds(
    environment: Mapping[str, Any], *, lengths: Iterable[int], chunks: Iterable[int], density: float
) -> list[dict[str, Any]]:
    """Least seconds of a prompt through Llama-3.1-8B's shape, by step size, length and mode, and the ratio to stock's.

    Args:
        environment: As for ``layer_seconds``.
        lengths: Prompt tokens.
        chunks: Tokens of a step.
        density: Of the pattern.
    """
    device = device_for(environment.get("device_name", ""))
    found: list[dict[str, Any]] = []
    if device is None:
        return found
    for chunk in chunks:
        for length in lengths:
            seconds = {
                mode: predict_request(
                    device.name, length, chunk, of, density=density, min_seq_len=0, min_prompt_len=0
                ).seconds
                for mode, of in _MODES.items()
            }
            found += [
                {"chunk": chunk, "length": length, "mode": mode, "seconds": value, "speedup": seconds["off"] / value}
                for mode, value in seconds.items()
            ]
    return found
