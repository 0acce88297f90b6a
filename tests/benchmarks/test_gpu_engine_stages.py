"""The GPU run's stages of engines and kernels: what they conclude from logs, answers and waits."""

from __future__ import annotations

import itertools
import random
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.reports import failed, make_report


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
