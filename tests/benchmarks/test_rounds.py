"""What follows from measured rounds, and how they are kept."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.serving.configurations import IDEAL, ROWS, STOCK, TRIMIX, configurations
from benchmarks.serving.gate import _counted, _gate_prompt, gate_spec
from benchmarks.serving.report import markdown, plot_ttft
from benchmarks.serving.rounds import Rounds, summarise
from benchmarks.serving.rows import PUBLISHED_ROWS
from vllm_trimix.config.entry import Resolved
from vllm_trimix.config.resolve import resolve

CONFIGURATIONS = configurations('{"starting_layer": 4}', [], ideal=True)
RESOLVED: dict[str, Resolved | None] = {
    c.name: None if c.trimix is None else resolve(c.trimix, model="m", num_layers=8) for c in CONFIGURATIONS
}


ROWS_RESOLVED: dict[str, Resolved | None] = {
    c.name: None if c.trimix is None else resolve(c.trimix, model="m", num_layers=8)
    for c in configurations('{"starting_layer": 4}', [], ideal=True, rows="published", shallow='{"min_seq_len": 9}')
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
            "ttfts_s": [ttft],
            # Of four layers, or all eight; the last 128 rows are dense.
            "dynamic_layer_rows": (length - 128) * (8 if name == "minference" else 4),
            "keys_read": 100 * (repeat + 1),
            "keys_causal": 1000,
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


def test_density_is_of_all_rounds_and_of_the_patterns_own_rows() -> None:
    rounds = [_round(1280, repeat, **dict.fromkeys(ROWS_RESOLVED, 2.0)) for repeat in range(3)]
    rows = {row["config"]: row for row in summarise(rounds, ROWS_RESOLVED)}
    for name, row in rows.items():
        if name in PUBLISHED_ROWS:
            # 600 of 3000 keys; 1152 of 1280 rows.
            assert (row["density"], row["dynamic_share"]) == (0.2, 0.9), name
            # The floor leaves the shallow layers dense: a saving over it would be no share of anything.
            assert row["captured_saving"] is None
        else:
            assert (row["density"], row["dynamic_share"]) == (None, None), name
    none = _round(1280, 0, **dict.fromkeys(ROWS_RESOLVED, 2.0))
    none["measurements"]["minference"] |= dict.fromkeys(("dynamic_layer_rows", "keys_read", "keys_causal"), 0)
    [row] = [row for row in summarise([none], ROWS_RESOLVED) if row["config"] == "minference"]
    assert (row["density"], row["dynamic_share"]) == (None, 0)


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


def test_the_report_of_dynamic_rows(tmp_path: Path) -> None:
    rounds = [
        _round(length, repeat, **dict.fromkeys(ROWS_RESOLVED, length / 1000 + repeat))
        for length in (32000, 48000)
        for repeat in range(3)
    ]
    environment = {"versions": {}, "amx": False, "gpu": "a GPU", "cpu": "", "cores": 2, "date": "", "commit": ""}
    configured = {name: {"trimix": {}, "arguments": []} for name in ROWS_RESOLVED}
    result = {
        "environment": environment,
        "settings": {"model": "m", "cpus": "0", "prompts": "kv-retrieval", "configurations": configured},
        "gate": {},
        "rows": summarise([{**r, "measurements": {**r["measurements"]}} for r in rounds], ROWS_RESOLVED),
    }
    text = markdown(result)
    # The published protocol's mean beside the median.
    assert "| TTFT (s) | ratio to stock | captured saving | pair bound | mean (s) | density (of rows) |" in text
    assert "| 32000 | minference | 33.000 (32.000-34.000) | 1.00 (1.00-1.00) |  |  | 33.000 | 0.200 (100%) |" in text
    assert "| 32000 | stock | 33.000 (32.000-34.000) | 1 |  |  | 33.000 |  |" in text
    assert "the mean of 3" in text
    assert "on random weights attention is flat" in text
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


@given(layers=st.integers(3, 40), data=st.data())
def test_gate_asks_nothing_far_away_of_a_dynamic_pattern(layers: int, data: st.DataObject) -> None:
    kinds = data.draw(st.lists(st.sampled_from("tsd"), min_size=layers, max_size=layers))
    triangle, shallow = ([layer for layer in range(layers) if kinds[layer] == kind] for kind in "ts")
    if not shallow:
        return
    last_n = data.draw(st.sampled_from([0, 128]))
    entry = {"layers": triangle, "shallow": {"pattern": "xattention", "layers": shallow, "last_n": last_n}}
    spec, hops = gate_spec(layers, resolve(entry, model="m", num_layers=layers))
    assert hops == 1 or kinds[spec.lookup_layer] == "d"
    # Triangle layers keep their dense last rows.
    if set(triangle) - {0, 1}:
        assert kinds[spec.answer_layer] == "t"
    elif last_n and set(shallow) - {0, 1}:
        assert kinds[spec.answer_layer] == "s"


@pytest.mark.parametrize("tokens", [1024, 1500, 8192])
def test_the_gates_record_lies_in_one_block(tokens: int) -> None:
    prompt = _gate_prompt(tokens, 1, ROWS_RESOLVED["trimix+xattention"])
    words = re.findall(r"\w+|[^\w\s]+", prompt.prompt)
    [value] = [number for number, word in enumerate(words) if word == prompt.answer and words[number - 1] == "is"]
    # BOS first; the row of the code learns from the two before it.
    assert (1 + value) % 64 >= 2


def test_the_gate_counts_rows_of_both_kinds() -> None:
    resolved = ROWS_RESOLVED["trimix+minference"]
    assert resolved is not None
    due = 8192 - 128
    keys = {"keys_read": 10, "keys_causal": 40}
    good = Counter(triangle=due, dynamic_layer_rows=4 * due, **keys)
    assert _counted(good, resolved, 8192) == [
        f"{due} triangle rows",
        f"{due} rows by vertical_slash, whose density was 0.250",
    ]
    # A last chunk below a tile stays dense.
    assert _counted(good | Counter(dynamic_layer_rows=4 * (due - 63)), resolved, 8192)
    for wrong in ({"triangle": due - 1}, {"dynamic_layer_rows": 4 * (due - 64)}, {"dynamic_layer_rows": 5 * due}):
        with pytest.raises(ValueError, match="were counted, 8064 were due"):
            _counted(Counter({**good, **wrong}), resolved, 8192)


def test_rows_by_name() -> None:
    found = {c.name: c for c in configurations('{"starting_layer": 4, "n_init": 2}', [], ideal=False, rows="published")}
    assert list(found) == [STOCK, TRIMIX, *PUBLISHED_ROWS]
    assert found["minference"].trimix == {"n_init": 2, "layers": [], "shallow": {"pattern": "vertical_slash"}}
    both = found["trimix+xattention"].trimix
    assert both == {"starting_layer": 4, "n_init": 2, "shallow": {"pattern": "xattention"}}
    for name in ROWS:
        [row] = configurations('{"starting_layer": 4}', [], ideal=False, rows=name, shallow='{"min_seq_len": 3}')[2:]
        resolved = resolve(row.trimix, model="m", num_layers=8)
        assert resolved.shallow is not None
        assert resolved.shallow.min_seq_len == 3
        assert resolved.shallow.layers == tuple(range(4 if "trimix" in name else 8))
    for arguments, message in (
        ({"rows": "minferense"}, "--rows: 'minferense' is not a row; did you mean 'minference'?"),
        ({"rows": "minference", "shallow": "["}, "--shallow: '\\[' is not JSON"),
        (
            {"rows": "minference", "shallow": '{"pattern": "x"}'},
            "is not an object of keys that every row's pattern has",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            configurations('{"starting_layer": 4}', [], ideal=False, **arguments)


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
