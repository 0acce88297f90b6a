"""What stands beside a measurement is what the page of bounds says, and nothing where it says nothing."""

from __future__ import annotations

import pytest

from benchmarks.gpu.predicted import layer_seconds, request_seconds
from benchmarks.gpu.prepared import FIRST, SECOND

H200 = {"device_name": "NVIDIA H200"}
SETTINGS = {stage.name: stage.settings for stage in (*FIRST, *SECOND)}


def test_the_layers_of_the_prepared_runs() -> None:
    line = SETTINGS["layer_line"]
    found = layer_seconds(H200, line["layer"], line["lengths"])
    assert list(found) == [32768, 131072]
    ratios = {length: ways["dense"] / ways["trimix_triton"] for length, ways in found.items()}
    # The targets are within what the device allows.
    assert all(ratios[length] > target for length, target in line["targets"])
    assert ratios[131072] == pytest.approx(88, abs=1)
    ways = layer_seconds(H200, SETTINGS["ways"]["layer"], SETTINGS["ways"]["lengths"])[131072]
    assert set(SETTINGS["ways"]["ways"]) < set(ways)


def test_the_requests_of_the_served_stage() -> None:
    served = SETTINGS["served"]
    found = request_seconds(H200, lengths=served["lengths"], chunks=served["chunks"], density=served["target_density"])
    assert len(found) == len(served["lengths"]) * len(served["chunks"]) * 3
    best = {(row["chunk"], row["length"], row["mode"]): row["speedup"] for row in found}
    assert best[8192, 131072, "off"] == 1
    assert 1.45 < best[8192, 131072, "triangle"] < best[8192, 131072, "on"]
    assert best[8192, 131072, "on"] > 2.5


@pytest.mark.parametrize("name", ["", "NVIDIA A100-SXM4-80GB", "NVIDIA H200 NVL"])
def test_other_devices_have_no_bounds(name: str) -> None:
    assert layer_seconds({"device_name": name}, SETTINGS["ways"]["layer"], [8192]) == {}
    assert request_seconds({"device_name": name}, lengths=[8192], chunks=[8192], density=0.1) == []
    assert request_seconds({}, lengths=[8192], chunks=[8192], density=0.1) == []


def test_another_layer_has_no_bounds() -> None:
    assert layer_seconds(H200, {**SETTINGS["ways"]["layer"], "head_size": 64}, [8192]) == {}
