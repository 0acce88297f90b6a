"""The GPU run's stages: what they refuse, what they conclude, and all of them at toy size."""

from __future__ import annotations

import importlib
import itertools
import json
import os
import random
import subprocess
import sys
import traceback
import venv
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import speed
from benchmarks.gpu.report import Report, load, save
from benchmarks.gpu.source import ROOT as SOURCE_ROOT
from benchmarks.gpu.stage import STAGE_LIMIT
from benchmarks.gpu.stages import STAGES
from vllm_trimix.demo.bench_model import SHAPES

ROOT = Path(__file__).parents[2]
RUN_ALL = ROOT / "benchmarks" / "gpu" / "run_all.sh"


def test_the_registry() -> None:
    assert len({stage.name for stage in STAGES}) == len(STAGES)
    for stage in STAGES:
        assert stage.seconds <= STAGE_LIMIT
        module, _, name = stage.function.partition(":")
        assert callable(getattr(importlib.import_module(module), name)), stage.name
        assert stage.toy.keys() <= stage.settings.keys(), f"{stage.name}: a rehearsal sets what the stage doesn't know"
    # An interrupted budget must have bought the most valuable first.
    assert [stage.name for stage in STAGES[:2]] == ["smoke", "kernel_reference"]


def run_all(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(RUN_ALL), *arguments],
        env={**os.environ, "PYTHON": sys.executable, **env},
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
    )


def test_what_run_all_refuses(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    venv.create(tmp_path / "bare", with_pip=False)
    bare = str(tmp_path / "bare" / "bin" / "python")
    for arguments, env, message in (
        (["--archive", str(tmp_path / "gone")], {}, f"--archive: no folder '{tmp_path}/gone'"),
        (["--archive", str(tmp_path / "empty")], {}, f"'{tmp_path}/empty' has no unpack.sh, inside or beside it"),
        ([], {"PYTHON": "python0.1"}, "no interpreter 'python0.1'; name one: PYTHON=/path/to/python3"),
        (["--toy"], {"PYTHON": bare}, f"{bare} can't import pydantic"),
    ):
        found = run_all(*arguments, TMPDIR=str(tmp_path), **env)
        assert found.returncode == 2, found.stderr
        assert found.stderr.startswith("run_all.sh: error: ")
        assert message in found.stderr
        assert found.stderr.count("\n") == 1


def test_without_a_gpu_only_a_rehearsal_runs(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="vLLM brings torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    found = run_all("--output", str(tmp_path / "out"))
    assert found.returncode == 2
    assert "no CUDA device" in found.stderr
    assert "--toy" in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("beside", [False, True], ids=["inside", "beside"])
def test_an_archive_is_unpacked_and_comes_before_what_is_installed(tmp_path: Path, beside: bool) -> None:
    pytest.importorskip("vllm", reason="the interpreter must have what the archive lacks")
    archive = tmp_path / "packed" / "vp"
    archive.mkdir(parents=True)
    # Python runs sitecustomize from its path at start: a trace in every process.
    sampler = "__import__('os').environ['VLLM_USE_FLASHINFER_SAMPLER']"
    (archive / "part00").write_text(f"open({str(tmp_path / 'trace')!r}, 'a').write({sampler})\n")
    script = 'mkdir -p "$2/bin"; cp "$1/part00" "$2/sitecustomize.py"; touch "$2/.complete"; echo unpacked\n'
    (archive.parent if beside else archive).joinpath("unpack.sh").write_text(script)
    found = run_all("--archive", str(archive), "--toy", "--dry-run", "--only=smoke", TMPDIR=str(tmp_path))
    assert found.returncode == 0, found.stderr
    assert "unpacked" in found.stdout
    assert "would run smoke" in found.stdout
    assert set((tmp_path / "trace").read_text()) == {"0"}, "the archive holds no FlashInfer"
    (archive.parent if beside else archive).joinpath("unpack.sh").write_text("exit 0\n")
    (next(tmp_path.glob("trimix-gpu-*")) / "site" / ".complete").unlink()
    found = run_all("--archive", str(archive), "--toy", "--dry-run", TMPDIR=str(tmp_path))
    assert found.returncode == 2
    assert "is not complete: parts are missing" in found.stderr


def make_report(tmp_path: Path, name: str, *, device: str = "cuda", memory: float = 150e9, **settings: Any) -> Report:
    """A report as the runner would hand it to a stage."""
    stage = next(stage for stage in STAGES if stage.name == name)
    path = tmp_path / f"{name}.json"
    settings = {"toy": False, "device": device, "group": stage.group, **stage.settings, **settings}
    environment = {"device": device, "device_memory_bytes": memory}
    save(
        path,
        {
            "stage": name,
            "status": "running",
            "settings": settings,
            "environment": environment,
            "checks": [],
            "source": "",
        },
    )
    return Report(path)


def failed(tmp_path: Path, name: str) -> list[str]:
    result = load(tmp_path / f"{name}.json")
    assert result is not None
    return [check["name"] for check in result["checks"] if not check["passed"]]


def test_a_figure_never_overwrites_the_verdict(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="figure: seconds, status is a field of every result"):
        make_report(tmp_path, "smoke").figure(seconds=1, status="passed")


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


def test_every_two_of_the_larger_kernel_cases_meet() -> None:
    pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")
    from benchmarks.gpu.kernel_reference import pairs

    levels = [
        (case.head_size, case.block_size, case.group, (case.q_dtype, case.cache_dtype)) for case in pairs().values()
    ]
    for one, other in itertools.combinations(range(4), 2):
        assert len({(level[one], level[other]) for level in levels}) == 16
    assert {case.head_size for case in pairs().values()} == {64, 96, 128, 256}


def test_tensors_keep_their_layout_on_the_way_to_a_device() -> None:
    pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")
    import torch

    from tests.kernels.triton_interpreter import Case, _build, on_device

    for case in (Case(((0, 5), (1100, 14)), dense=(1,), programs=8), Case(((60, 9),), order="SBH")):
        arguments = _build(case).arguments
        moved = on_device(arguments, "cpu:0")
        for name, tensor in arguments.items():
            if name == "partials" and tensor is not None:
                assert moved[name].values.shape == tensor.values.shape
                continue
            if not isinstance(tensor, torch.Tensor):
                assert moved[name] == tensor
                continue
            assert (moved[name].stride(), moved[name].shape) == (tensor.stride(), tensor.shape), name
            assert moved[name].data_ptr() != tensor.data_ptr()
            torch.testing.assert_close(moved[name], tensor, rtol=0, atol=0, equal_nan=True)
        assert moved["k_cache"].untyped_storage().data_ptr() == moved["v_cache"].untyped_storage().data_ptr()


def test_where_a_wait_is() -> None:
    from benchmarks.gpu.sync_debug import place

    def frame(file: str, name: str) -> traceback.FrameSummary:
        return traceback.FrameSummary(file, 7, name)

    builder = frame("site/vllm_trimix/backend/builder.py", "build")
    flash = frame("site/vllm/v1/attention/backends/flash_attn.py", "build")
    torch_frame = frame("site/torch/_tensor.py", "item")
    assert place([flash, builder, torch_frame]) == "vllm_trimix builder.py:7 build"
    assert place([builder, flash, torch_frame]) == "vllm flash_attn.py:7 build"
    assert place([torch_frame]) == "other _tensor.py:7 item"


START = "INFO TRIMIX: layers=1-3 of=4 min_prompt_len=0 dense=FLASH_ATTN kernel=triton stock_layers=none source=config\n"
V2 = "INFO 01-01 [model_runner.py:424] Model loading took\n"
V1 = "INFO 01-01 [gpu_model_runner.py:5149] Model loading took\n"
GRAPHS = "INFO 01-01 Graph capturing finished in 3 secs, took 0.1 GiB\n"


@pytest.mark.parametrize(
    ("log", "dense", "wrong"),
    [
        (START + V2 + GRAPHS, None, []),
        (START + V2 + GRAPHS, "FLASH_ATTN", []),
        (START + V2 + GRAPHS, "TRITON_ATTN", ["x: start-up line"]),
        (START.replace("triton", "torch_cpu") + V2 + GRAPHS, None, ["x: start-up line"]),
        (START.replace("none", "1:head_size") + V2 + GRAPHS, None, ["x: start-up line"]),
        (START + V1 + GRAPHS, None, ["x: runner"]),
        (START + V2, None, ["x: CUDA graphs"]),
        ("", None, ["x: start-up line", "x: runner", "x: CUDA graphs"]),
    ],
)
def test_the_log_of_a_gpu_engine(tmp_path: Path, log: str, dense: str | None, wrong: list[str]) -> None:
    from benchmarks.gpu.engine import _check_engine

    _check_engine(make_report(tmp_path, "engine_v2_graphs"), "x", log, dense=dense)
    assert failed(tmp_path, "engine_v2_graphs") == wrong


def test_rows_of_vllms_own_warm_up_are_no_prompt_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Model runner V2 warms its kernels up by requests, which TRIMIX counts as any others."""
    from benchmarks.gpu import engine
    from tests.engine.ledger import Ledger
    from tests.engine.run import Result

    right = {"triangle": 1653, "triangle_layer_rows": 3 * 1653, "opt_out": 1769, "decode": 316}

    def run_job(*arguments: Any, **_: Any) -> Result:
        ledgers = [Ledger(Counter(rows), {}, []) for rows in ({"short_prompt": 148, "decode": 67}, right)]
        total = ledgers[0].rows + ledgers[1].rows
        return Result(arguments[2], total, {}, START + V2 + GRAPHS, [], ledgers=ledgers)

    monkeypatch.setattr(engine, "run_job", run_job)
    monkeypatch.setattr(engine, "save_small_model", lambda path: path)
    judged: list[int] = []
    monkeypatch.setattr(engine, "_check_distances", lambda *found: judged.append(len(found[4].waves[0])) or True)
    engine.logprobs(make_report(tmp_path, "engine_v2_graphs", scenarios=["float16-async"]))
    assert failed(tmp_path, "engine_v2_graphs") == []
    assert judged == [20], "the answers of the requests that count"


def test_fp8_answers_are_judged_by_stock_fp8(tmp_path: Path) -> None:
    from benchmarks.gpu.engine import _check_quantised
    from benchmarks.gpu.small_model import prompts, save_small_model
    from tests.engine.models import true_logprobs
    from tests.engine.run import LAYERS, PATTERN, Result, both_ways

    model = save_small_model(tmp_path / "model")
    wave = both_ways(prompts([200, 300]), max_tokens=8)
    generator = random.Random(0)

    def answers(error: float, sparse: frozenset[int]) -> Result:
        rows = []
        for request in wave:
            layers = frozenset() if request["extra_args"] else sparse
            tokens = [generator.randrange(3, 200) for _ in range(8)]
            truth = true_logprobs(model, request["prompt"], tokens, layers=layers, pattern=PATTERN)
            rows.append({"tokens": tokens, "logprobs": [value + generator.uniform(-error, error) for value in truth]})
        return Result([rows], Counter(triangle=500 - 2 * PATTERN.last_n), {}, START, [])

    exact, quantised = answers(0.01, LAYERS), answers(0.1, LAYERS)
    report = make_report(tmp_path, "fp8_kv")
    _check_quantised(report, "fp8", model, wave, exact, quantised)
    assert failed(tmp_path, "fp8_kv") == []
    # Dense all along; and not quantised at all.
    _check_quantised(report, "fp8", model, wave, exact, answers(0.1, frozenset()))
    assert set(failed(tmp_path, "fp8_kv")) == {"fp8: triangle answers", "fp8: the mask bites"}
    _check_quantised(report, "bf16", model, wave, quantised, exact)
    assert "bf16: it is quantised" in failed(tmp_path, "fp8_kv")


def test_one_real_stage_and_its_resumption(tmp_path: Path) -> None:
    pytest.importorskip("vllm", reason="stages run vLLM")
    pytest.importorskip("triton", reason="the kernel needs Triton (Linux)")
    arguments = ("--toy", "--only=kernel_reference", f"--output={tmp_path / 'out'}")
    found = run_all(*arguments)
    assert found.returncode == 0, found.stdout + found.stderr
    result = load(tmp_path / "out" / "kernel_reference.json")
    assert result is not None
    assert (result["status"], result["cases"], result["cases_skipped"]) == ("passed", 8, [])
    assert result["environment"]["versions"]["vllm"]


KINDS = (
    "smoke",
    "engine_v2_eager",
    "circuit",
    "kernels",
    # The second finds its servers' rounds measured by the first.
    "ttft_128k,ttft_32k_64k,decode",
    "fp8_kv",
    "sync_debug",
    "breakdown",
    "rows_gate",
    "rows_circuit",
)
"""One stage of each kind: others differ in settings, which the toy size replaces."""


def test_every_kind_of_stage_is_rehearsed() -> None:
    stages = {stage.name: stage.function for stage in STAGES}
    rehearsed = {stages[name] for names in KINDS for name in names.split(",")}
    assert rehearsed | {stages["kernel_reference"]} == set(stages.values())


@pytest.mark.slow
@pytest.mark.parametrize("names", KINDS)
def test_a_stage_at_toy_size(tmp_path: Path, names: str) -> None:
    pytest.importorskip("vllm", reason="stages run vLLM")
    found = run_all("--toy", f"--only={names}", "--output", str(tmp_path / "out"))
    results = {name: load(tmp_path / "out" / f"{name}.json") for name in names.split(",")}
    assert all(results.values()), found.stdout + found.stderr
    verdicts = {name: (result["status"], result["seen"]) for name, result in results.items() if result}
    if verdicts.get(names) == ("skipped", "vLLM keeps fp8 KV on CPUs with AVX-512 or AMX only"):
        pytest.skip("vLLM keeps fp8 KV on CPUs with AVX-512 or AMX only")
    assert [name for name, (status, _) in verdicts.items() if status != "passed"] == [], verdicts
    assert found.returncode == 0
    summary = (tmp_path / "out" / "summary.md").read_text()
    assert all(f"| {name} | passed |" in summary for name in results)


def test_run_all_is_executable() -> None:
    assert os.access(RUN_ALL, os.X_OK)
    assert SOURCE_ROOT == ROOT
