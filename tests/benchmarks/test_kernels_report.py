"""The kernel benchmark's report, and what it refuses."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import benchmark_kernels
from benchmarks.kernels import ceilings, contenders
from tests.benchmarks.kernel_settings import TRIMIX_CPU, mutated, whole_mask
from tests.cpu import fast_dtype
from vllm_trimix.patterns.triangle import Triangle

pytest.importorskip("matplotlib", reason="the figure needs matplotlib (extra plot)")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kernels")
    arguments = ["--lengths", "1500,700", "--repeats", "2", "--quick", "--device", "cpu", "--chunk", "512"]
    arguments += ["--dtype", fast_dtype()]
    assert benchmark_kernels.main(["--output", str(folder), *arguments]) == 0
    return folder


def test_json_holds_what_every_time_needs(report: Path) -> None:
    result = json.loads((report / "kernels.json").read_text())
    assert result["environment"]["cpu"]
    assert result["environment"]["date"]
    assert result["settings"]["lengths"] == [700, 1500]
    assert result["settings"]["dense_baseline"] == "vllm_cpu"
    assert result["settings"]["chunk"] == 512
    samples = result["ceilings"]["samples"]
    assert len(samples["matmul"]) == len(samples["copy"]) == 10
    rows = result["rows"]
    assert {row["contender"] for row in rows} == contenders.CONTENDERS.keys()
    timed = [row for row in rows if row["status"] == "ok"]
    assert {(row["contender"], row["length"]) for row in timed} == {
        (name, length) for name in ("vllm_cpu", "torch_sdpa", "trimix_cpu", "trimix_cpu_sdpa") for length in (700, 1500)
    }
    for row in timed:
        low, high = row["seconds_ci95"]
        assert 0 < min(row["samples"]) <= low <= row["seconds_median"] <= high <= max(row["samples"])
        assert len(row["samples"]) == 2
        # The ceilings are measured beside other tests, and may come out low.
        assert 0 < row["roofline_fraction"] < 4
        assert row["max_error"] <= row["error_budget"]["max"]
        assert row["rms_error"] <= row["error_budget"]["rms"]
        dense = row["length"] * (row["length"] + 1) // 2
        pairs = dense if row["pattern"] == "dense" else int(whole_mask(Triangle(), row["length"]).sum())
        assert row["flops"] == 4 * 64 * 8 * pairs
        assert row["pair_bound"] == dense / pairs
        base = next(r for r in timed if (r["contender"], r["length"]) == ("vllm_cpu", row["length"]))
        assert row["speedup_over_dense"] == base["seconds_median"] / row["seconds_median"]
    for row in rows:
        if row["status"] != "ok":
            assert row["reason"]
            assert not row["samples"]


def test_report_names_device_date_and_samples(report: Path) -> None:
    result = json.loads((report / "kernels.json").read_text())
    text = (report / "kernels.md").read_text()
    head = text.splitlines()[0]
    for part in (result["environment"]["cpu"], result["environment"]["date"], "vllm", "torch", "2 repeats"):
        assert part in head
    for row in result["rows"]:
        assert f"`{row['contender']}`" in text
        for sample in row["samples"]:
            assert f"{1e3 * sample:.4g}" in text
    assert "left out by --quick" in text
    assert (report / "kernels.png").read_bytes().startswith(b"\x89PNG")


def test_a_refused_time_is_in_no_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ceilings.MATMUL_SIZE, "cpu", 256)
    monkeypatch.setitem(ceilings.COPY_BYTES, "cpu", 2**20)
    wrong = dataclasses.replace(TRIMIX_CPU, prepare=lambda problem: mutated(problem, "n_local-1"))
    monkeypatch.setitem(contenders.CONTENDERS, "trimix_cpu", wrong)
    arguments = ["--output", str(tmp_path), "--lengths", "800", "--repeats", "1", "--device", "cpu"]
    assert benchmark_kernels.main([*arguments, "--contenders", "vllm_cpu,trimix_cpu"]) == 0
    rows = {row["contender"]: row for row in json.loads((tmp_path / "kernels.json").read_text())["rows"]}
    row = rows["trimix_cpu"]
    assert row["status"] == "refused"
    assert row["samples"] == []
    for key in ("seconds_median", "seconds_ci95", "speedup_over_dense", "roofline_fraction", "plan_seconds_median"):
        assert row[key] is None
    assert "| 800 | **trimix_cpu**" not in capsys.readouterr().out
    assert "`trimix_cpu` at 800 tokens: refused: " in (tmp_path / "kernels.md").read_text()


BAD_INPUT = {
    "head-size": (["--head-size", "65"], "--head-size: 65 is not supported on cpu; one of [32, 64,"),
    "length": (["--lengths", "100,0"], "--lengths: 0 is too small; the least is 1"),
    "length-text": (["--lengths", "4k"], "--lengths: '4k' is not a comma-separated list of whole numbers"),
    "contender": (["--contenders", "trimx_cpu"], "unknown contender 'trimx_cpu'; did you mean 'trimix_cpu'?"),
    "contender-far": (["--contenders", "zzz"], "unknown contender 'zzz'; one of vllm_cpu,"),
    "heads": (["--num-heads", "7"], "--num-heads: 7 is not a multiple of --num-kv-heads 2"),
    "block": (["--block-size", "100"], "--block-size: 100 is not a multiple of 32"),
    "window": (["--n-local", "0"], "--n-local: 0 is too small; the least is 1"),
    "chunk": (["--chunk", "0"], "--chunk: 0 is too small; the least is 1"),
    "repeats": (["--repeats", "0"], "--repeats: 0 is too small; the least is 1"),
    "fp8": (["--kv-cache-dtype", "fp8"], "--kv-cache-dtype: fp8 pages stay dense on CPU"),
    "dtype": (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "unknown": (["--lenghts", "5"], "unrecognized arguments: --lenghts 5"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, message = BAD_INPUT[case]
    output = tmp_path / "out"
    assert benchmark_kernels.main(["--output", str(output), "--device", "cpu", *arguments]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("benchmark_kernels: error: ")
    assert message in lines[0]
    assert not output.exists()


def test_cuda_without_a_device_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert benchmark_kernels.main(["--output", str(tmp_path), "--device", "cuda"]) == 2
    assert "--device: torch sees no CUDA device here; use cpu" in capsys.readouterr().err
