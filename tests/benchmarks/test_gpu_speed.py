"""The GPU run's timed stages: which servers fit a device, what is asked of them, and what fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import speed
from benchmarks.gpu.report import load
from tests.benchmarks.reports import failed, make_report
from vllm_trimix.demo.bench_model import SHAPES


def test_server_memory() -> None:
    kv, together = speed.server_bytes(SHAPES["llama-3.1-8b"], kv_tokens=131072, kv_element=2)
    assert kv == 16 * speed.GIB
    # 8.03 billion parameters.
    assert together - kv - 4 * speed.GIB == pytest.approx(16.06e9, rel=1e-3)


@pytest.fixture
def benchmarked(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], list[list[str]]]:
    """Records the calls of benchmark_ttft in place of running it; TRIMIX takes ``ratio`` of stock's time."""

    def record(ratio: float) -> list[list[str]]:
        calls = []

        def benchmark(module: str, folder: Path, arguments: list[str], result: str) -> dict[str, Any]:
            calls.append(arguments)
            rows = speed.row_names(next(text for text in arguments if text.startswith("--rows="))[7:])
            if "--gate-only" in arguments:
                return dict.fromkeys(rows[1:], "answered, 8064 rows by a pattern")
            read = dict(argument[2:].split("=", 1) for argument in arguments if "=" in argument)
            found = [
                {
                    "config": config,
                    "length": int(length),
                    "concurrency": int(concurrency),
                    "ttft_median_s": 1.0,
                    "itl_median_s": 0.01,
                    "ratio_to_stock": ratio,
                    "itl_ratio_to_stock": ratio,
                    "density": 0.1 if config in rows else None,
                }
                for config in ("stock", "trimix", *rows)
                for length in read["lengths"].split(",")
                for concurrency in read["concurrency"].split(",")
            ]
            return {"rows": found, "gate": {"trimix": "right"}}

        monkeypatch.setattr(speed, "_benchmark", benchmark)
        return calls

    return record


@pytest.mark.parametrize(
    ("name", "memory", "ideal", "kv_tokens"),
    [
        ("ttft_128k", 150e9, True, 131072),
        ("ttft_128k", 84e9, False, 131072),
        ("decode", 84e9, False, 131072),
        ("ttft_512k_fp8", 150e9, False, 524288),
        ("ttft_256k_fp8", 150e9, False, 524288),
        ("ttft_256k_fp8", 84e9, False, 262144),
    ],
)
def test_servers_fit_the_device(
    tmp_path: Path, benchmarked: Any, name: str, memory: float, ideal: bool, kv_tokens: int
) -> None:
    calls = benchmarked(0.7)
    report = make_report(tmp_path, name, memory=memory)
    speed.decode(report) if name == "decode" else speed.ttft(report)
    assert failed(tmp_path, name) == []
    [arguments] = calls
    assert ("--no-ideal" not in arguments) is ideal
    kv = next(int(text.rsplit("=", 1)[1]) for text in arguments if "kv-cache-memory-bytes" in text)
    element = 65536 if "fp8" in name else 131072
    assert kv == (kv_tokens + 4096) * element
    assert (2 + ideal) * (kv + 20e9) < memory
    model = Path(next(text for text in arguments if text.startswith("--model=")).split("=")[1])
    config = json.loads((model / "config.json").read_text())
    assert config["max_position_embeddings"] >= max(report.settings["lengths"]) + report.settings["decode_tokens"] + 1
    for argument in report.settings["serve_arguments"]:
        assert f"--serve-arg={argument}" in arguments


def test_too_small_a_device_is_skipped(tmp_path: Path, benchmarked: Any) -> None:
    calls = benchmarked(0.7)
    for name, memory in (("ttft_128k", 40e9), ("ttft_512k_fp8", 84e9)):
        speed.ttft(make_report(tmp_path, name, memory=memory))
        result = load(tmp_path / f"{name}.json")
        assert result is not None
        assert result["status"] == "skipped"
        assert "do not fit" in result["seen"]
    assert calls == []


def test_slower_than_stock_fails(tmp_path: Path, benchmarked: Any) -> None:
    benchmarked(1.03)
    speed.ttft(make_report(tmp_path, "ttft_32k_64k"))
    speed.decode(make_report(tmp_path, "decode"))
    assert failed(tmp_path, "ttft_32k_64k") == ["faster than stock at 32768", "faster than stock at 65536"]
    assert failed(tmp_path, "decode") == ["as fast as stock, batch 1", "as fast as stock, batch 16"]


def test_a_dynamic_row_has_its_own_servers(tmp_path: Path, benchmarked: Any) -> None:
    calls = benchmarked(0.7)
    for name in ("rows_minference_short", "rows_minference_long", "rows_circuit", "rows_256k_fp8"):
        speed.rows(make_report(tmp_path, name))
        assert failed(tmp_path, name) == []
    short, long, circuit, fp8 = ({text.partition("=")[0]: text.partition("=")[2] for text in call} for call in calls)
    assert (short["--rows"], short["--prompts"], short["--shallow"]) == (
        "minference",
        "kv-retrieval",
        '{"min_seq_len": 0}',
    )
    # The published lengths, and the rest of them in the group's other stage.
    lengths = [int(text) for call in (short, long) for text in call["--lengths"].split(",")]
    assert lengths == list(range(32000, 128001, 16000))
    assert short["--model"] == long["--model"]
    assert (circuit["--rows"], circuit["--prompts"]) == ("published", "document")
    config = json.loads((Path(circuit["--model"]) / "config.json").read_text())
    attention = {key: config[key] for key in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")}
    assert attention == {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    assert "--serve-arg=--load-format=dummy" not in calls[2]
    assert "--serve-arg=--load-format=dummy" in calls[3]
    assert fp8["--lengths"] == "262144"
    assert all("--no-ideal" in call for call in calls)


def test_dynamic_rows_that_do_not_fit_are_skipped(tmp_path: Path, benchmarked: Any) -> None:
    calls = benchmarked(0.7)
    speed.rows(make_report(tmp_path, "rows_minference_short", memory=84e9))
    result = load(tmp_path / "rows_minference_short.json")
    assert result is not None
    assert result["status"] == "skipped"
    assert result["seen"].startswith("3 servers of 35 GiB do not fit")
    assert calls == []


def test_a_row_that_was_not_gated_fails_the_gate_stage(tmp_path: Path, benchmarked: Any) -> None:
    benchmarked(0.7)
    speed.gate(make_report(tmp_path, "rows_gate"))
    assert failed(tmp_path, "rows_gate") == ["minference"]


def test_stages_of_a_group_share_a_folder(tmp_path: Path, benchmarked: Any) -> None:
    benchmarked(0.7)
    folders = []
    for name in ("ttft_128k", "ttft_32k_64k", "decode", "ttft_256k_fp8", "ttft_512k_fp8"):
        report = make_report(tmp_path, name)
        speed.decode(report) if name == "decode" else speed.ttft(report)
        result = load(tmp_path / f"{name}.json")
        assert result is not None
        folders.append(result["folder"])
    assert len(set(folders[:3])) == len(set(folders[3:])) == 1
    assert folders[0] != folders[3]
