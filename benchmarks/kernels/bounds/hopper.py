"""The short table of ``docs/kernels.md``, "What Hopper allows": one triangle layer on an H200."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.kernels.bounds.bound import Bound
from benchmarks.kernels.bounds.devices import DEVICES
from benchmarks.kernels.bounds.layer import PATTERN, predict_layer
from benchmarks.kernels.bounds.tables import CHUNK, LENGTHS, table

_DEVICE = DEVICES["H200"]
MATMUL_FLOP_S, DENSE_FLOP_S = _DEVICE.matmul_flop_s, _DEVICE.dense_flop_s


@dataclass(frozen=True)
class Prediction:
    """One prompt length.

    Attributes:
        bound: Our kernel's.
        dense: Seconds of dense attention.
        pair_bound: Dense pairs over triangle pairs.
    """

    bound: Bound
    dense: float
    pair_bound: float

    @property
    def tensor(self) -> float:
        """Seconds of the matrix products as executed, masked parts included."""
        return self.bound.alone["tensor cores"]

    @property
    def ours(self) -> float:
        """Seconds at best."""
        return self.bound.seconds


def predict(length: int) -> Prediction:
    """One layer's prefill of ``length`` tokens in chunks of 8192."""
    pairs = length * (length + 1) / 2 / PATTERN.visible_pairs(length)
    dense = predict_layer(_DEVICE.name, length, CHUNK, "dense").seconds
    return Prediction(predict_layer(_DEVICE.name, length, CHUNK), dense, pairs)


def markdown() -> str:
    """The table, in ms."""
    rows = []
    for length in LENGTHS:
        p = predict(length)
        times = (f"{1e3 * p.ours:.2f}", p.bound.resource, f"{1e3 * p.dense:.2f}")
        rows.append((f"{length // 1024}K", *times, f"{p.dense / p.ours:.0f}x", f"{p.pair_bound:.0f}x"))
    header = ("prompt", "ours at best", "bound by", "dense (FA3, published rate)", "ratio at best", "pair bound")
    return table(header, rows)
