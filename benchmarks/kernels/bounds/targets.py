"""What the project wants to reach, beside what the bounds allow."""

from __future__ import annotations

from benchmarks.kernels.bounds.layer import predict_layer
from benchmarks.kernels.bounds.request import predict_request
from vllm_trimix.config.shallow import DEFAULT_MIN_SEQ_LEN

DEVICE = "H200"
CHUNK = 8192
LONG, MIDDLE = 131072, 32768
LAYER_TARGETS = ((LONG, 60.0), (MIDDLE, 18.0))
"""Prompt tokens, and how many times as fast as dense attention a triangle layer should be."""
REQUEST_TARGETS = (("triangle", 1.45), ("triangle+pattern", 2.5), ("triangle+pattern", 2.8))
"""Mode, and how many times as fast as stock a prompt of 128K should be."""
CHUNKED_SHARE = 0.9
"""Of the gain without chunks, that chunks of 8192 should keep."""
_STARTS = {0: "", DEFAULT_MIN_SEQ_LEN: ", default `min_seq_len`"}


def targets() -> list[tuple[str, str, str, str]]:
    """Rows of a table: target, what is reached at best, whether, and how many times its bound ours may take."""
    rows = []
    for length, wanted in LAYER_TARGETS:
        dense = predict_layer(DEVICE, length, CHUNK, "dense").seconds
        ours = predict_layer(DEVICE, length, CHUNK).seconds
        name = f"triangle layer, {length // 1024}K: {wanted:g}x dense"
        rows.append((name, f"{dense / ours:.0f}x", _yes(dense / ours >= wanted), f"{dense / wanted / ours:.2f} times"))
    for mode, wanted in REQUEST_TARGETS:
        for start, words in _starts(mode).items():
            gain = _gain(mode, CHUNK, start)
            name = f"128K, {mode.replace('+', ' + ')}{words}: {wanted:g}x stock"
            room = f"{_room(mode, wanted, start):.1f} times" if gain >= wanted else "-"
            rows.append((name, f"{gain:.2f}x", _yes(gain >= wanted), room))
    for mode in ("triangle", "triangle+pattern"):
        for start, words in _starts(mode).items():
            kept = _gain(mode, CHUNK, start) / _gain(mode, None, start)
            name = f"128K, {mode.replace('+', ' + ')}{words}: chunks of 8192 keep {CHUNKED_SHARE:g} of the gain"
            rows.append((name, f"{kept:.2f}", _yes(kept >= CHUNKED_SHARE), "-"))
    return rows


def _starts(mode: str) -> dict[int, str]:
    """Where the pattern begins to be used, and how a row says it."""
    return _STARTS if "pattern" in mode else {0: ""}


def _gain(mode: str, chunk: int | None, min_seq_len: int) -> float:
    stock = predict_request(DEVICE, LONG, chunk, "stock").seconds
    return stock / predict_request(DEVICE, LONG, chunk, mode, min_seq_len=min_seq_len).seconds


def _room(mode: str, wanted: float, min_seq_len: int) -> float:
    """How many times its bound our attention may take where the target is still reached."""
    best = predict_request(DEVICE, LONG, CHUNK, mode, min_seq_len=min_seq_len)
    ours = best.triangle + best.pattern
    stock = predict_request(DEVICE, LONG, CHUNK, "stock").seconds
    return (stock / wanted - (best.seconds - ours)) / ours


def _yes(reached: bool) -> str:
    return "yes" if reached else "no"
