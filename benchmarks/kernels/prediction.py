"""What the kernels can reach, from what is known without a GPU: work, instructions, bytes, ceilings.

``python -m benchmarks.kernels.prediction`` prints the tables of ``docs/bounds.md``. It is arithmetic, not a
measurement: dense attention counts at its published rate, ours at the least time that its resources allow.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from benchmarks.kernels.bounds.bound import Bound
from benchmarks.kernels.bounds.devices import DEVICES, Device, device_for
from benchmarks.kernels.bounds.layer import WAYS, predict_layer
from benchmarks.kernels.bounds.request import MODES, RequestPrediction, predict_request
from benchmarks.kernels.bounds.sparse import predict_estimate, predict_selection, predict_sparse
from benchmarks.kernels.bounds.tables import LENGTHS, tables
from benchmarks.kernels.generated import fill

__all__ = [
    "DEVICES",
    "LENGTHS",
    "MODES",
    "PAGE",
    "WAYS",
    "Bound",
    "Device",
    "RequestPrediction",
    "device_for",
    "main",
    "predict_estimate",
    "predict_layer",
    "predict_request",
    "predict_selection",
    "predict_sparse",
]

PAGE = Path(__file__).parents[2] / "docs/bounds.md"


def main() -> None:
    """Command line: prints every table; ``--write`` puts them into ``docs/bounds.md``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels.prediction", description=__doc__)
    parser.add_argument("--write", action="store_true", help="also write the tables into docs/bounds.md")
    options = parser.parse_args()
    made = tables()
    for name, text in made.items():
        print(f"## {name}\n\n{text}\n")
    if options.write:
        PAGE.write_text(fill(PAGE.read_text(), made))


if __name__ == "__main__":
    main()
