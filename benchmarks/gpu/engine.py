"""Real engines against Hugging Face with the mask: both model runners, with and without CUDA graphs, and fp8 KV."""

from __future__ import annotations

import re
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.report import Report
from benchmarks.gpu.small_model import distances, prompts, save_small_model
from benchmarks.gpu.triage import triage_engine
from tests.engine.run import LAYERS, PATTERN, Result, both_ways, run_job

# Every boundary of the rule, then prompts that are cut into chunks. The short ones decode while the long ones prefill.
_SHORT = [1, PATTERN.n_init, PATTERN.n_local, PATTERN.dense_len - 1, PATTERN.dense_len, PATTERN.dense_len + 1]
_LONG = [131, 256, 500, 777]
_CHUNK = 200
_TOKENS, _LONG_ANSWER = 6, 24
# Model runner V2 warms up by requests of its own, which are counted: what an answer before costs is left out.
_FIRST = [{"prompt": prompts([20])[0], "max_tokens": 1}]
# Stock's own distance from the fp32 truth; beyond it the truth is not comparable.
_MOST_STOCK_ERROR = {"float32": 1e-2, "float16": 0.1, "bfloat16": 0.5}
_LEAST_GAP = 10
_ENGINE = {"max_num_batched_tokens": _CHUNK, "max_num_seqs": 64}
# A KV cache of a known size: engines run side by side, and vLLM's profiling would count one another's memory.
_ENGINE_CUDA = {
    "gpu_memory_utilization": 0.05,
    "kv_cache_memory_bytes": 2 * 2**30,
    "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8, 16, 32]},
}


def logprobs(report: Report) -> None:
    """Log-probabilities and row counters of every scenario of the stage's model runner."""
    model = save_small_model(report.folder / "model")
    for scenario in report.settings["scenarios"]:
        with report.checking(scenario):
            if scenario == "one_token_chunks":
                _one_token_chunks(report, model)
            else:
                _mixed(report, model, scenario)
    if not report.cuda:
        report.seen("on the CPU only model runner V1 exists, without CUDA graphs")


def engine_arguments(report: Report, dtype: str) -> dict[str, Any]:
    """LLM arguments of a small engine on this device."""
    return {**_ENGINE, **(_ENGINE_CUDA if report.cuda else {}), "dtype": dtype}


def run(
    report: Report,
    name: str,
    model: Path,
    waves: list[list[dict[str, Any]]],
    *,
    engine: dict[str, Any],
    trimix: dict[str, Any] | None = None,
    stock: bool = False,
    env: dict[str, str] | None = None,
    stdout_rows: bool = False,
) -> Result:
    """``run_job`` with the engine's log kept in the stage's folder; ``stock`` leaves TRIMIX out.

    Its seconds in ``LLM.generate`` count as the device's.
    """
    folder = report.folder / name
    folder.mkdir(exist_ok=True)
    if stock:
        engine = {**engine, "attention_backend": None, "additional_config": {}}
        env = {**(env or {}), "VLLM_PLUGINS": ""}
    result = run_job(folder, model, waves, engine=engine, trimix=trimix, env=env, stdout_rows=stdout_rows)
    (folder / "engine.log").write_text(result.log)
    report.add_device_seconds(result.generate_seconds)
    return result


def _mixed(report: Report, model: Path, scenario: str) -> None:
    """Chunked prompts of all lengths, triangle and opted out, beside requests that decode all the while.

    A scenario is ``dtype-scheduling`` or ``dtype-scheduling-DENSE_BACKEND``.
    """
    dtype, scheduling, *dense = scenario.split("-")
    wave = both_ways(prompts(_SHORT), max_tokens=_LONG_ANSWER) + both_ways(prompts(_LONG, seed=1), max_tokens=_TOKENS)

    def ask(name: str, requests: list[dict[str, Any]], graphs: bool) -> Result:
        result = run(
            report,
            name,
            model,
            [_FIRST, requests],
            engine={
                **engine_arguments(report, dtype),
                "async_scheduling": scheduling == "async",
                "enforce_eager": not graphs,
            },
            trimix={"dense_backend": dense[0]} if dense else None,
            env=runner_env(report),
        )
        asked = result.ledgers[-1]
        return replace(result, waves=result.waves[-1:], ledgers=[asked], rows=asked.rows, metrics=asked.metrics)

    result = ask(scenario, wave, report.settings["graphs"])
    _check_engine(report, scenario, result.log, dense=dense[0] if dense else None)
    if not _check_distances(report, scenario, model, wave, result, dtype):
        triage_engine(
            report,
            scenario,
            model,
            wave,
            result,
            rerun=lambda requests, graphs: ask(f"{scenario}_alone", requests, graphs),
        )
    lengths = _SHORT + _LONG
    body = sum(length - PATTERN.last_n for length in lengths if length > PATTERN.dense_len)
    expected = {
        "triangle": body,
        "triangle_layer_rows": body * len(LAYERS),
        "opt_out": sum(lengths),
        "decode": 2 * (len(_SHORT) * (_LONG_ANSWER - 1) + len(_LONG) * (_TOKENS - 1)),
    }
    counted = {key: result.rows[key] for key in expected}
    report.check(f"{scenario}: rows", counted == expected, f"counted {counted}, prompt arithmetic {expected}")


def _one_token_chunks(report: Report, model: Path) -> None:
    """Prompts computed one token a step: with CUDA graphs such steps replay a decode graph, and are dense."""
    wave = both_ways(prompts([60, 120]), max_tokens=3)
    dtype = "float16" if report.cuda else "float32"
    result = run(
        report,
        "one_token_chunks",
        model,
        [wave],
        engine={
            **engine_arguments(report, dtype),
            "long_prefill_token_threshold": 1,
            "enforce_eager": not report.settings["graphs"],
        },
        env=runner_env(report),
    )
    replays = report.cuda and report.settings["graphs"]
    found = distances(model, wave, result.waves[0], layers=frozenset() if replays else LAYERS)
    budget = 2 * max(found.dense) + 2e-5
    report.check(
        "one_token_chunks: answers",
        max(found.triangle) <= budget,
        f"{max(found.triangle):.2g} off the {'dense' if replays else 'masked'} truth, budget {budget:.2g}",
    )
    counted = {key: result.rows[key] for key in ("triangle", "graph_replay")}
    expected = {"triangle": 0, "graph_replay": 2 * 180} if replays else {"triangle": 180 - 2 * PATTERN.last_n}
    expected.setdefault("graph_replay", 0)
    report.check("one_token_chunks: rows", counted == expected, f"counted {counted}, expected {expected}")


def runner_env(report: Report) -> dict[str, str]:
    """Environment that chooses the model runner; CPUs have only V1."""
    return {"VLLM_USE_V2_MODEL_RUNNER": "1" if report.cuda and report.settings["runner"] == "v2" else "0"}


def _check_engine(report: Report, name: str, log: str, *, dense: str | None) -> None:
    """The log says which backend, runner and graphs there were."""
    start = re.search(r"TRIMIX: layers=.*dense=(\S+) kernel=(\S+) stock_layers=(\S+)", log)
    kernel = "triton" if report.cuda else "torch_cpu"
    right = start is not None and start[2] == kernel and start[3] == "none" and dense in (None, start[1])
    report.check(f"{name}: start-up line", right, start[0] if start else "there is none")
    if not report.cuda:
        return
    module = "model_runner.py" if report.settings["runner"] == "v2" else "gpu_model_runner.py"
    report.check(
        f"{name}: runner", f"[{module}:" in log, f"{module} {'wrote' if f'[{module}:' in log else 'not'} in log"
    )
    captured = re.search(r"Graph capturing finished.*", log)
    report.check(
        f"{name}: CUDA graphs",
        bool(captured) is report.settings["graphs"],
        captured[0] if captured else "none captured",
    )


def _check_distances(
    report: Report, name: str, model: Path, wave: list[dict[str, Any]], result: Result, dtype: str
) -> bool:
    """Triangle answers are as close to the masked truth as stock's to the dense truth, which is far from them.

    Returns:
        Whether stock's and the triangle's answers are right.
    """
    found = distances(model, wave, result.waves[0])
    budget = 2 * max(found.dense) + 2e-5
    report.figure(
        **{name: {"triangle": max(found.triangle), "stock": max(found.dense), "gap": max(found.gap), "dtype": dtype}}
    )
    stock = report.check(
        f"{name}: stock answers", max(found.dense) < _MOST_STOCK_ERROR[dtype], f"{max(found.dense):.2g} off"
    )
    triangle = report.check(
        f"{name}: triangle answers",
        max(found.triangle) <= budget,
        f"{max(found.triangle):.2g} off, budget {budget:.2g}",
    )
    report.check(
        f"{name}: the mask bites", max(found.gap) > _LEAST_GAP * budget, f"the dense truth is {max(found.gap):.2g} off"
    )
    return stock and triangle


def fp8_kv(report: Report) -> None:
    """fp8 KV cache: what the triangle adds to stock fp8's own error is nothing; on CPUs it stays dense and says so."""
    if not report.cuda and not (torch.cpu._is_avx512_supported() or torch.cpu._is_amx_tile_supported()):
        report.skip("vLLM keeps fp8 KV on CPUs with AVX-512 or AMX only")
        return
    model = save_small_model(report.folder / "model")
    wave = both_ways(prompts(_SHORT + _LONG), max_tokens=_TOKENS)
    eager = {"enforce_eager": not report.settings["graphs"]}
    engine = {**engine_arguments(report, "bfloat16"), **eager}
    exact = run(report, "auto", model, [wave], engine=engine) if report.cuda else None
    for kv_cache_dtype in report.settings["kv_cache_dtypes"]:
        with report.checking(kv_cache_dtype):
            quantised = {**engine, "kv_cache_dtype": kv_cache_dtype}
            result = run(report, kv_cache_dtype, model, [wave], engine=quantised)
            if exact is None:
                _check_dense_on_cpu(report, wave, result)
            else:
                _check_quantised(report, kv_cache_dtype, model, wave, exact, result)


def _check_quantised(
    report: Report, name: str, model: Path, wave: list[dict[str, Any]], exact: Result, result: Result
) -> None:
    """Means, not maxima: three bits of mantissa make single tokens jump."""
    errors = {}
    for which, answers in (("auto", exact.waves[0]), (name, result.waves[0])):
        found = distances(model, wave, answers)
        errors[which] = [statistics.fmean(values) for values in (found.triangle, found.dense, found.gap)]
    triangle, dense, gap = errors[name]
    report.figure(**{f"{name}_mean_error": {"triangle": triangle, "stock": dense, "gap": gap, "bf16": errors["auto"]}})
    start = re.search(r"TRIMIX: layers=.*stock_layers=(\S+)", result.log)
    report.check(f"{name}: start-up line", start is not None and start[1] == "none", start[0] if start else "none")
    report.check(
        f"{name}: it is quantised", dense > errors["auto"][1], f"stock {dense:.2g} off, {errors['auto'][1]:.2g}"
    )
    report.check(f"{name}: triangle answers", triangle <= 2 * dense, f"{triangle:.2g} off; stock fp8 {dense:.2g}")
    report.check(f"{name}: the mask bites", gap > 3 * triangle, f"the dense truth is {gap:.2g} off")
    body = sum(
        len(request["prompt"]) - PATTERN.last_n for request in wave[::2] if len(request["prompt"]) > PATTERN.dense_len
    )
    report.check(f"{name}: rows", result.rows["triangle"] == body, f"{result.rows['triangle']} of {body} triangle rows")


def _check_dense_on_cpu(report: Report, wave: list[dict[str, Any]], result: Result) -> None:
    """Opted out or not, every answer is stock fp8's."""
    start = re.search(r"TRIMIX: layers=.*stock_layers=(\S+)", result.log)
    named = start is not None and start[1].count("fp8_kv_on_cpu") == len(LAYERS)
    report.check("start-up line", named, start[0] if start else "there is none")
    report.check("rows", result.rows["triangle_layer_rows"] == 0, f"{result.rows['triangle_layer_rows']} layer rows")
    apart = max(
        abs(mine["logprobs"][0] - stock["logprobs"][0])
        for mine, stock in zip(result.waves[0][::2], result.waves[0][1::2], strict=True)
    )
    report.check("answers", apart < 1e-3, f"first log-probabilities are within {apart:.2g} of the opted-out ones")
    report.seen("on CPUs fp8 KV is dense; the start-up line says so")
