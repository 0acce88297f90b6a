"""What follows from measured rounds, and how they are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.configurations import IDEAL, STOCK, TRIMIX, configurations
from benchmarks.gate import gate_spec
from benchmarks.report import markdown, plot_ttft
from benchmarks.rounds import Rounds, summarise
from vllm_trimix.config import Resolved, resolve

CONFIGURATIONS = configurations('{"starting_layer": 4}', [], ideal=True)
RESOLVED: dict[str, Resolved | None] = {
    c.name: None if c.trimix is None else resolve(c.trimix, model="m", num_layers=8) for c in CONFIGURATIONS
}


def _round(length: int, repeat: int, **ttfts: float) -> dict[str, Any]:
    measurements = {
        name: {
            "ttft_s": ttft,
            "itl_s": 0.01,
            "throughput_tokens_s": 100.0,
            "peak_memory_bytes": 1,
            "gpu_memory_bytes": None,
            "idle_cpu": 0.0,
        }
        for name, ttft in ttfts.items()
    }
    return {"length": length, "concurrency": 1, "repeat": repeat, "measurements": measurements}


def _rows(rounds: list[dict[str, Any]]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(row["config"], row["length"]): row for row in summarise(rounds, RESOLVED)}


def test_captured_saving_is_the_share_of_what_the_floor_saves() -> None:
    rounds = [_round(8192, repeat, stock=10 + repeat, trimix=7 + repeat, ideal=6 + repeat) for repeat in range(5)]
    row = _rows(rounds)[TRIMIX, 8192]
    assert row["ttft_median_s"] == 9
    assert row["ratio_to_stock"] == 0.75
    # Machine drift moves all three alike, and the medians with it: (12 - 9) / (12 - 8).
    assert row["captured_saving"] == 0.75
    assert row["captured_ci95"] == [0.75, 0.75]
    assert _rows(rounds)[STOCK, 8192]["captured_saving"] is None
    assert _rows(rounds)[IDEAL, 8192]["captured_saving"] is None


@pytest.mark.parametrize(("length", "bound"), [(8192, 0.85), (16384, 0.92), (32768, 0.96)])
def test_pair_bound_at_the_defaults(length: int, bound: float) -> None:
    row = _rows([_round(length, 0, stock=2.0, trimix=1.0, ideal=1.0)])[TRIMIX, length]
    assert row["pair_bound"] == pytest.approx(bound, abs=0.01)


def test_prompts_that_stay_dense_capture_nothing() -> None:
    row = _rows([_round(512, 0, stock=2.0, trimix=1.9, ideal=1.0)])[TRIMIX, 512]
    assert row["captured_saving"] is None
    assert row["pair_bound"] is None


def test_rounds_are_kept_and_resumed(tmp_path: Path) -> None:
    first = Rounds(tmp_path, {"model": "a"})
    first.add(_round(512, 0, stock=1.0))
    with open(tmp_path / "rounds.jsonl", "a") as file:
        file.write('{"length": 512, "concurr')
    second = Rounds(tmp_path, {"model": "a"})
    assert second.has(512, 1, 0)
    assert not second.has(512, 1, 1)
    second.add(_round(512, 1, stock=1.0))
    assert len(Rounds(tmp_path, {"model": "a"}).done) == 2
    with pytest.raises(ValueError, match=r"model: 'a' there, 'b' now"):
        Rounds(tmp_path, {"model": "b"})


def test_report_and_plot_hold_every_row(tmp_path: Path) -> None:
    rounds = [
        _round(length, repeat, stock=length / 1000, trimix=length / 1200, ideal=length / 1300)
        for length in (4096, 8192)
        for repeat in range(3)
    ]
    result = {
        "environment": {
            "versions": {"vllm": "1"},
            "amx": False,
            "gpu": None,
            "cpu": "a CPU",
            "cores": 2,
            "date": "2026-01-01",
            "commit": "abc",
        },
        "settings": {
            "model": "bench-8l",
            "cpus": "0",
            "configurations": {c.name: {"trimix": c.trimix, "arguments": []} for c in CONFIGURATIONS},
        },
        "gate": {"trimix": "seen"},
        "rows": summarise(rounds, RESOLVED),
    }
    text = markdown(result)
    assert "| 8192 | trimix | 6.827 (6.827-6.827) | 0.83 (0.83-0.83) | 0.72 (0.72-0.72) | 0.85 |" in text
    assert "correctness gate, `trimix`: seen" in text
    assert "a CPU (2 cores, no AMX); vllm 1; 2026-01-01; commit abc" in text
    plot_ttft(result, tmp_path / "ttft.png")
    assert (tmp_path / "ttft.png").stat().st_size > 10_000


@given(layers=st.integers(3, 40), data=st.data())
def test_gate_asks_what_the_configuration_can_answer(layers: int, data: st.DataObject) -> None:
    sparse = data.draw(st.sets(st.integers(0, layers - 1), min_size=1))
    last_n = data.draw(st.sampled_from([0, 128]))
    resolved = resolve({"layers": sorted(sparse), "last_n": last_n}, model="m", num_layers=layers)
    spec, hops = gate_spec(layers, resolved)
    assert spec.layers == layers
    if hops == 2:
        assert spec.lookup_layer not in sparse
    if last_n and sparse - {0, 1}:
        assert spec.answer_layer in sparse
    if not last_n and set(range(2, layers)) - sparse:
        # Without dense last rows a triangle layer can't read the answer.
        assert spec.answer_layer not in sparse


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["wide"], "is not NAME=JSON"),
        (["ideal={}"], "'ideal' is taken"),
        (["trimix={}"], "'trimix' is taken"),
        (["wide={"], "--config wide: '{' is not JSON"),
        (['wide={"n_last": 3}'], "did you mean 'last_n'"),
    ],
)
def test_bad_configurations_are_named(more: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        configurations('{"starting_layer": 4}', more, ideal=True)
