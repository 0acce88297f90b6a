"""The kernel benchmark: its counting against the mask, its red gate, its report, on vLLM's real CPU ops."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import benchmark_kernels
from benchmarks.kernels import ceilings, contenders, flex
from benchmarks.kernels.counting import count_work, dense_pattern, visible_keys
from benchmarks.kernels.problem import Problem, Settings, _fill_cuda_cache, make_problem
from benchmarks.kernels.reference import make_reference, sample_rows
from benchmarks.kernels.timing import Measurement, measure
from tests.backend.flash_on_cpu import flash_on_cpu
from tests.cpu import fast_dtype
from vllm_trimix.patterns.triangle import Triangle

pytest.importorskip("matplotlib", reason="the figure needs matplotlib (extra plot)")

PATTERNS = {
    "published": Triangle(),
    "small": Triangle(4, 10, 8),
    "no-sinks": Triangle(0, 7, 5),
    "no-last-rows": Triangle(3, 1, 0),
    "sinks-beyond-window": Triangle(40, 3, 9),
    "beyond-the-prompt": Triangle(500, 2000, 3000),
    "dense": dense_pattern(700),
}


def settings(**changes: object) -> Settings:
    base = Settings(
        device=torch.device("cpu"),
        dtype=torch.bfloat16,
        fp8=False,
        num_heads=4,
        num_kv_heads=2,
        head_size=64,
        block_size=32,
        chunk=256,
        pattern=Triangle(8, 100, 30),
        threads=1,
        repeats=1,
    )
    return dataclasses.replace(base, **changes)


def whole_mask(pattern: Triangle, length: int) -> torch.Tensor:
    positions = torch.arange(length)
    return pattern.mask(positions, positions, length)


@pytest.mark.parametrize("length", [1, 2, 13, 63, 128, 700])
@pytest.mark.parametrize("name", PATTERNS)
def test_counts_are_the_masks(name: str, length: int) -> None:
    pattern, mask = PATTERNS[name], whole_mask(PATTERNS[name], length)
    assert pattern.visible_pairs(length) == int(mask.sum())
    for chunk in (1, 50, 256, 700):
        for start in range(0, length, chunk):
            end = min(start + chunk, length)
            assert visible_keys(pattern, length, start, end) == int(mask[start:end].any(0).sum()), (start, end)


def test_dense_counts_every_pair() -> None:
    assert dense_pattern(1000).visible_pairs(1000) == 1000 * 1001 // 2
    # The published bound at 128K.
    assert round(dense_pattern(131072).visible_pairs(131072) / Triangle().visible_pairs(131072)) == 101


def test_flops_and_bytes() -> None:
    work = count_work(
        Triangle(2, 3, 0),
        6,
        [(0, 4), (4, 6)],
        num_heads=4,
        num_kv_heads=2,
        head_size=64,
        q_bytes=1,
        kv_bytes=1,
        out_bytes=2,
    )
    # Rows see 1, 2, 3, 4, 5, 5 keys; the chunks see keys 0-3 and 0-5.
    assert work.pairs == 20
    assert work.flops == 20 * 4 * 64 * 4
    assert work.bytes == 6 * 4 * 64 * (1 + 2) + (4 + 6) * 2 * 2 * 64


@pytest.mark.parametrize("length", [1, 128, 700, 1024])
@pytest.mark.parametrize("name", PATTERNS)
def test_flex_blocks_are_the_masks(name: str, length: int) -> None:
    """Every visible pair lies in a listed block, and a block without a mask is wholly visible."""
    blocks = -(-length // flex.BLOCK)
    mask = torch.zeros(blocks * flex.BLOCK, blocks * flex.BLOCK, dtype=torch.bool)
    mask[:length, :length] = whole_mask(PATTERNS[name], length)
    tiles = mask.view(blocks, flex.BLOCK, blocks, flex.BLOCK)
    some, whole = flex.visible_blocks(PATTERNS[name], length, torch.device("cpu"))
    assert torch.equal(some | whole, tiles.any(3).any(1))
    assert not (some & whole).any()
    assert (tiles.all(3).all(1) | ~whole).all()
    block_mask = flex.make_block_mask(PATTERNS[name], length, torch.device("cpu"))
    i = torch.arange(length)
    assert torch.equal(block_mask.mask_mod(0, 0, i[:, None], i[None]), mask[:length, :length])


def test_sampled_rows_hold_the_edges() -> None:
    pattern = Triangle(8, 100, 30)
    rows = sample_rows(5000, settings(pattern=pattern).chunks(5000), pattern)
    assert len(rows) == 48
    assert rows == sorted(set(rows))
    assert {0, 7, 8, 99, 100, 107, 108, 4969, 4970, 4999} <= set(rows)
    assert {255, 256} <= set(rows)
    assert sample_rows(3, [(0, 3)], pattern) == [0, 1, 2]


TRIMIX_CPU = contenders.CONTENDERS["trimix_cpu"]
# A kernel that computes another pattern than the one it is asked for, and what it gets wrong.
MUTANTS = {
    "n_local-1": lambda pattern: dataclasses.replace(pattern, n_local=pattern.n_local - 1),
    "n_local+1": lambda pattern: dataclasses.replace(pattern, n_local=pattern.n_local + 1),
    "n_init-1": lambda pattern: dataclasses.replace(pattern, n_init=pattern.n_init - 1),
    "last_n-1": lambda pattern: dataclasses.replace(pattern, last_n=pattern.last_n - 1),
    "last_n+1": lambda pattern: dataclasses.replace(pattern, last_n=pattern.last_n + 1),
}


def mutated(problem: Problem, change: str) -> contenders.Prepared:
    wrong = dataclasses.replace(problem.settings, pattern=MUTANTS[change](problem.settings.pattern))
    return TRIMIX_CPU.prepare(dataclasses.replace(problem, settings=wrong))


@pytest.mark.parametrize("pattern", [Triangle(8, 100, 30), Triangle()], ids=["small", "published"])
def test_a_wrong_kernel_gets_no_time(pattern: Triangle) -> None:
    """One key or one row off is enough, at the published parameters too."""
    entrants = {"right": TRIMIX_CPU} | {
        change: dataclasses.replace(TRIMIX_CPU, prepare=lambda problem, change=change: mutated(problem, change))
        for change in MUTANTS
    }
    problem = make_problem(settings(pattern=pattern), 1100)
    results = measure(problem, entrants, repeats=1)
    assert results["right"].status == "ok", results["right"].reason
    assert len(results["right"].samples) == 1
    for change in MUTANTS:
        assert results[change].status == "refused", change
        assert "exceeds the budget" in results[change].reason
        assert results[change].samples == results[change].plan_samples == []


def test_a_kernel_that_turns_wrong_loses_its_times() -> None:
    right = contenders.CONTENDERS["vllm_cpu"]

    class TurnsWrong:
        def __init__(self, problem: Problem) -> None:
            self._inner, self._runs = right.prepare(problem), 0
            self.plan = self._inner.plan

        def run(self) -> list[torch.Tensor]:
            self._runs += 1
            outputs = self._inner.run()
            return outputs if self._runs < 4 else [output * 1.05 for output in outputs]

    result = measure(make_problem(settings(), 300), {"x": dataclasses.replace(right, prepare=TurnsWrong)}, repeats=2)
    assert result["x"].status == "refused"
    assert result["x"].samples == []


def test_rows_left_unwritten_are_refused() -> None:
    right = contenders.CONTENDERS["vllm_cpu"]

    class Lazy:
        def __init__(self, problem: Problem) -> None:
            self._inner = right.prepare(dataclasses.replace(problem, chunks=problem.chunks[1:]))
            self._out = [problem.out]
            self.plan = self._inner.plan

        def run(self) -> list[torch.Tensor]:
            self._inner.run()
            return self._out

    result = measure(make_problem(settings(), 600), {"x": dataclasses.replace(right, prepare=Lazy)}, repeats=1)
    assert result["x"].status == "refused"


def test_making_ready_takes_no_time_yet() -> None:
    """Compiled, warm and judged before the first round: what comes later may have the device to itself."""
    right = contenders.CONTENDERS["vllm_cpu"]
    runs = {"right": 0, "wrong": 0}

    class Counted:
        def __init__(self, problem: Problem, name: str) -> None:
            self._inner, self._name = right.prepare(problem), name
            self.plan = self._inner.plan

        def run(self) -> list[torch.Tensor]:
            runs[self._name] += 1
            outputs = self._inner.run()
            return outputs if self._name == "right" else [output * 1.05 for output in outputs]

    entrants = {
        name: dataclasses.replace(right, prepare=lambda problem, name=name: Counted(problem, name)) for name in runs
    }
    measurement = Measurement(make_problem(settings(), 300), entrants)
    assert runs == {"right": 0, "wrong": 0}
    measurement.prepare()
    assert runs == {"right": 2, "wrong": 2}
    assert measurement.results["wrong"].status == "refused"
    assert measurement.results["right"].samples == []
    for number in range(3):
        measurement.round(last=number == 2)
    # What was wrong takes no further part.
    assert runs == {"right": 5, "wrong": 2}
    assert len(measurement.results["right"].samples) == 3


def test_a_failing_contender_spoils_nothing() -> None:
    def broken(problem: Problem) -> contenders.Prepared:
        raise RuntimeError("no\nkernel image")

    right = contenders.CONTENDERS["vllm_cpu"]
    entrants = {"broken": dataclasses.replace(right, prepare=broken), "right": right}
    results = measure(make_problem(settings(), 200), entrants, repeats=1)
    assert (results["broken"].status, results["broken"].reason) == ("failed", "RuntimeError: no kernel image")
    assert results["right"].status == "ok"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def test_cpu_contenders_are_right(dtype: torch.dtype) -> None:
    """In every dtype, with the last rows straddling a step and a last step of one row."""
    shape = settings(dtype=dtype, chunk=280)
    names = ["vllm_cpu", "torch_sdpa", "trimix_cpu", "trimix_cpu_sdpa"]
    results = measure(make_problem(shape, 561), {name: contenders.CONTENDERS[name] for name in names}, repeats=1)
    assert {name: (result.status, result.reason) for name, result in results.items()} == dict.fromkeys(
        names, ("ok", None)
    )


def test_fp8_products_have_a_budget_of_their_own() -> None:
    """An fp8 kernel's probabilities have three bits; the budget of bf16 kernels would refuse every one of them."""
    problem = make_problem(settings(), 700)
    plain = make_reference(problem, problem.settings.pattern).budget
    fp8 = make_reference(problem, problem.settings.pattern, fp8_products=True).budget
    assert 2 * plain.rms < fp8.rms < 0.1


CUDA_ONLY = {"vllm_fa2", "vllm_fa3", "vllm_fa4", "flashinfer", "cudnn_sdpa", "flash_attn", "xformers"} | {
    name for name in contenders.CONTENDERS if name.startswith(("trimix_triton", "trimix_flash"))
}


def test_cuda_contenders_say_why_they_cannot_run() -> None:
    importlib.import_module("benchmarks.kernels.cuda_contenders")
    assert contenders.CONTENDERS.keys() >= CUDA_ONLY
    for name in CUDA_ONLY:
        assert contenders.CONTENDERS[name].unavailable(settings()) == "runs on cuda, not on cpu"
    if torch.cuda.is_available():
        pytest.skip("the reasons below are those of a machine without a GPU")
    cuda = settings(device=torch.device("cuda"))
    assert contenders.CONTENDERS["vllm_cpu"].unavailable(cuda) == "runs on cpu, not on cuda"
    for name in ("vllm_fa2", "vllm_fa3", "vllm_fa4"):
        assert "FlashAttention" in contenders.CONTENDERS[name].unavailable(cuda)
    for name in ("flashinfer", "flash_attn", "xformers"):
        assert contenders.CONTENDERS[name].unavailable(cuda) == f"the package {name} is not installed"
    assert contenders.CONTENDERS["cudnn_sdpa"].unavailable(cuda) == "this torch has no cuDNN"
    assert contenders.CONTENDERS["trimix_triton"].unavailable(cuda)
    for name in ("trimix_flash_merge", "trimix_flash_pages"):
        assert "FlashAttention" in contenders.CONTENDERS[name].unavailable(cuda)


def test_rounded_to_pages_is_checked_against_its_own_mask() -> None:
    """Right by its own definition, and wrong by the triangle's: the gate must know which one it is told."""
    problem = make_problem(settings(pattern=Triangle(8, 100, 30)), 1100)
    position, block_size = torch.arange(1100), problem.settings.block_size
    slots = problem.block_table[0, position // block_size] * block_size + position % block_size
    blocks = problem.block_table.numel() + 1
    problem.kv_cache, _ = _fill_cuda_cache(problem.settings, problem.k, problem.v, slots, blocks)
    merge, pages = (contenders.CONTENDERS[f"trimix_flash_{name}"] for name in ("merge", "pages"))
    assert "superset, rounded to pages" in pages.about
    wrong = {"merge as pages": dataclasses.replace(merge, own_mask=pages.own_mask)}
    wrong["pages as merge"] = dataclasses.replace(pages, own_mask=None)
    with flash_on_cpu():
        results = measure(problem, {"merge": merge, "pages": pages, **wrong}, repeats=1)
    assert {name: result.status for name, result in results.items()} == {
        "merge": "ok",
        "pages": "ok",
        "merge as pages": "refused",
        "pages as merge": "refused",
    }, results


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
        assert 0 < row["roofline_fraction"] < 1
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
