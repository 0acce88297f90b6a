"""The stages that time one layer, through the CPU's kernels: what they say, check and refuse, and the launch shapes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import layer_speed
from benchmarks.gpu.report import Report, granted_file, load, save, waiting_file
from benchmarks.kernels import contenders, tiles, timing
from benchmarks.kernels.contenders import CONTENDERS
from benchmarks.kernels.problem import Problem
from tests.wheels import fetch
from vllm_trimix.kernels.triton_configs import TileConfig, config_for

ROOT = Path(__file__).parents[2]
LAYER = {"num_heads": 4, "num_kv_heads": 2, "head_size": 64, "block_size": 32, "chunk": 256}
TOY: dict[str, dict[str, Any]] = {
    "layer_line": {"layer": LAYER, "lengths": [400], "ours": "trimix_cpu", "repeats": 2, "targets": [[400, 0.001]]},
    "ways": {"layer": LAYER, "lengths": [400], "ways": ["trimix_cpu", "trimix_cpu_sdpa"], "repeats": 2},
    "tile_table": {
        "layers": [LAYER],
        "length": 400,
        "ours": "trimix_cpu",
        "candidates": ["trimix_cpu_sdpa"],
        "repeats": 2,
    },
}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """The stages take one thread; other tests get theirs back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(tmp_path: Path, name: str, **changes: Any) -> tuple[dict[str, Any], list[str]]:
    """A stage's result, and what it had said of itself when it asked for the device."""
    path = tmp_path / f"{name}.json"
    settings = {"toy": True, "device": "cpu", "group": None, **TOY[name], **changes}
    common = {"environment": {"device": "cpu"}, "checks": [], "source": ""}
    save(path, {"stage": name, "status": "running", "settings": settings, **common})
    asked: list[str] = []

    def grant() -> None:
        while not waiting_file(path).exists():
            time.sleep(0.01)
        asked.extend(check["name"] for check in (load(path) or {"checks": []})["checks"])
        granted_file(path).write_text("100")
        waiting_file(path).unlink()

    thread = threading.Thread(target=grant, daemon=True)
    thread.start()
    getattr(layer_speed, name)(Report(path))
    thread.join()
    result = load(path)
    assert result is not None
    return result, asked


def failures(result: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in result["checks"] if not check["passed"]}


def test_the_line_of_speed(tmp_path: Path) -> None:
    result, asked = run(tmp_path, "layer_line")
    assert failures(result) == {}
    # Found right before the device is asked for.
    assert asked == ["400 vllm_cpu", "400 trimix_cpu"]
    rows = result["layers"]["400"]
    assert [len(row["samples_s"]) for row in rows.values()] == [2, 2]
    assert rows["trimix_cpu"]["error"] <= rows["trimix_cpu"]["budget"]
    (reached,) = result["targets"]
    slow, fast = (row["samples_s"] for row in rows.values())
    assert reached["speedup"] == pytest.approx(sum(a / b for a, b in zip(slow, fast, strict=True)) / 2)
    assert reached["met"] is True
    assert result["seen"].startswith("400: vllm_cpu ")
    assert result["seen"].endswith(f"{reached['speedup']:.1f}x (target 0.001x)")
    # What is counted as the device's is the timed rounds, nothing before them.
    assert result["device_seconds"] >= sum(slow + fast)


def test_ways_are_ranked_and_say_why_they_are_missing(tmp_path: Path) -> None:
    result, _ = run(tmp_path, "ways", ways=["trimix_cpu", "trimix_flash_merge"])
    assert failures(result) == {}
    assert result["layers"]["400"]["trimix_flash_merge"]["status"] == "unavailable"
    assert result["layers"]["400"]["trimix_flash_merge"]["reason"] == "runs on cuda, not on cpu"
    milliseconds = [float(part.split()[-2]) for part in result["seen"].removeprefix("400: ").split(", ")]
    assert len(milliseconds) == 2
    assert milliseconds == sorted(milliseconds)


def wrong_after(monkeypatch: pytest.MonkeyPatch, runs: int) -> None:
    """Makes ``trimix_cpu_sdpa`` wrong from one of its runs on."""
    right = CONTENDERS["trimix_cpu_sdpa"]

    class TurnsWrong:
        def __init__(self, problem: Problem) -> None:
            self._inner, self._runs = right.prepare(problem), 0
            self.plan = self._inner.plan

        def run(self) -> list[torch.Tensor]:
            self._runs += 1
            outputs = self._inner.run()
            return outputs if self._runs <= runs else [output * 1.05 for output in outputs]

    monkeypatch.setitem(contenders.CONTENDERS, "trimix_cpu_sdpa", dataclasses.replace(right, prepare=TurnsWrong))


def test_a_wrong_way_fails_before_the_device_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_after(monkeypatch, 0)
    result, asked = run(tmp_path, "ways")
    assert "400 trimix_cpu_sdpa" in asked
    assert failures(result).keys() == {"400 trimix_cpu_sdpa"}
    assert "exceeds the budget" in failures(result)["400 trimix_cpu_sdpa"]
    assert "trimix_cpu_sdpa" not in result["seen"]


def test_a_way_that_turns_wrong_loses_its_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong_after(monkeypatch, 3)
    result, _ = run(tmp_path, "ways")
    assert failures(result).keys() == {"right to the end"}
    assert "400 trimix_cpu_sdpa: max error" in failures(result)["right to the end"]
    assert result["layers"]["400"]["trimix_cpu_sdpa"]["samples_s"] == []


def test_a_launch_shape_that_fails_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped one must work; of another it is said that it doesn't."""
    monkeypatch.setattr(layer_speed, "_compile", lambda jobs: {})
    wrong_after(monkeypatch, 0)
    result, _ = run(tmp_path, "tile_table")
    assert failures(result) == {}
    assert result["layers"]["d64"]["trimix_cpu_sdpa"]["status"] == "refused"
    assert result["tiles"][0]["winner"] == "trimix_cpu"


def table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seconds: dict[str, list[float]]) -> dict[str, Any]:
    """The table of launch shapes if each round took so long."""
    monkeypatch.setattr(layer_speed, "_compile", lambda jobs: {})
    names = iter(seconds)
    left = {name: iter(times) for name, times in seconds.items()}

    def timed(call: Any, device: torch.device) -> float:
        nonlocal names
        call()
        name = next(names, None)
        if name is None:
            names = iter(seconds)
            name = next(names)
        return next(left[name])

    monkeypatch.setattr(timing, "time_call", timed)
    monkeypatch.setattr(timing, "time", types.SimpleNamespace(perf_counter=lambda: 0.0))
    result, _ = run(tmp_path, "tile_table", repeats=len(next(iter(seconds.values()))))
    return result


def test_a_winner_must_win_by_more_than_noise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    faster = table(monkeypatch, tmp_path, {"trimix_cpu": [1.0, 1.0], "trimix_cpu_sdpa": [0.9, 0.8]})
    assert faster["tiles"][0]["winner"] == "trimix_cpu_sdpa"
    assert faster["seen"] == (
        "d64: trimix_cpu_sdpa wins: no launch shape; shipped 1e+03 ms, of that trimix_cpu_sdpa 0.85"
    )
    noisy = table(monkeypatch, tmp_path, {"trimix_cpu": [1.0, 1.0], "trimix_cpu_sdpa": [0.8, 1.01]})
    assert noisy["tiles"][0]["winner"] == "trimix_cpu"
    slight = table(monkeypatch, tmp_path, {"trimix_cpu": [1.0, 1.0], "trimix_cpu_sdpa": [0.99, 0.99]})
    assert slight["seen"] == "d64: shipped wins; shipped 1e+03 ms, of that trimix_cpu_sdpa 0.99"


@pytest.mark.parametrize("padded", tiles.CANDIDATES)
def test_what_is_pasted_is_the_winner(padded: int) -> None:
    shipped = config_for(padded, 2, 2, 90)
    for name, (_, tile) in tiles.CANDIDATES[padded].items():
        # The work is cut by it before the launch shape is known.
        assert tile.block_m == shipped.block_m
        assert tile != shipped
        line = layer_speed._line(padded, tiles.contender(padded, name))
        assert line is not None
        assert eval(f"{{{line}}}", {"TileConfig": TileConfig}) == {(padded, 2): tile}
    assert layer_speed._line(padded, "trimix_triton") is None
    assert padded in tiles.head_sizes(padded)


def test_every_head_size_has_one_table() -> None:
    for size in range(16, 257, 16):
        assert sum(size in tiles.head_sizes(padded) for padded in tiles.CANDIDATES) == 1
    settings = {"candidates": None}
    assert layer_speed._candidates(settings, 96)[0] == "trimix_triton_deep"
    assert set(layer_speed._candidates(settings, 256)) <= CONTENDERS.keys()


_COMPILES = """
import json, sys
from unittest import mock
from benchmarks.kernels.tiles import CANDIDATES
from vllm_trimix.kernels import triton_compile
found = {}
for padded, candidates in CANDIDATES.items():
    for name, (_, tile) in candidates.items():
        with mock.patch.object(triton_compile, "config_for", return_value=tile):
            report = triton_compile.compile_variant(triton_compile.Variant(90, padded))
        shared = report.shared_bytes // 1024
        found[f"{padded} {name}"] = [report.spill_bytes, report.loop_waits, shared, report.tile]
print(json.dumps(found))
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["3.6.0", "3.7.1"])
def test_launch_shapes_compile_without_spills(version: str, tmp_path: Path) -> None:
    pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path / "cache")
    if version != "3.7.1":
        folder = ROOT / "build" / f"triton-{version}"
        missing = fetch(f"triton=={version}", folder)
        if missing is not None:
            pytest.skip(missing)
        environment["PYTHONPATH"] = os.pathsep.join([str(folder), environment.get("PYTHONPATH", "")])
    output = subprocess.run(
        [sys.executable, "-c", _COMPILES], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    found = json.loads(output.splitlines()[-1])
    assert len(found) == sum(map(len, tiles.CANDIDATES.values()))
    for name, (spills, waits, shared, tile) in found.items():
        padded, which = name.split()
        assert spills == 0, (name, tile)
        assert (waits > 2) == ((int(padded), which) in tiles.WAITING), (name, waits, tile)
        assert shared <= 227, (name, tile)
