"""The timed stages: this package's own benchmarks, at sizes that only a GPU makes sensible."""

from __future__ import annotations

import hashlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.environment import environment
from benchmarks.gpu.report import Report
from benchmarks.serving.rows import PUBLISHED_ROWS
from vllm_trimix.demo.bench_model import SHAPES, ModelShape, make_bench_model
from vllm_trimix.demo.circuit_spec import CircuitSpec

GIB = 2**30
# Attention of Llama-3.1-8B's shape with next to nothing beside it. Its heads attend sharply to one key each, to near
# rows, to equal words and to all statements, so that patterns have something to choose.
_CIRCUIT_SPEC = CircuitSpec(layers=32, lookup_layer=8, answer_layer=24, heads=32, kv_heads=8, distractor_heads=32)
CIRCUIT = ModelShape(
    hidden_size=384, layers=32, heads=32, kv_heads=8, intermediate_size=64, vocab_size=16384, head_size=128
)
# Beside weights and KV cache: CUDA context, activations of 8192 tokens, CUDA graphs.
_OVERHEAD = 4 * GIB
_USABLE = 0.95
# The answer, the pages of 16 requests that are partly filled, and the page that vLLM keeps empty.
_KV_SLACK = 4096


def kernels(report: Report) -> None:
    """One layer's prefill, kernel against kernel; the benchmark refuses a time to a kernel that is wrong."""
    settings = report.settings
    arguments = [
        f"--device={report.device}",
        f"--lengths={_list(settings['lengths'])}",
        f"--repeats={settings['repeats']}",
        *settings["arguments"],
    ]
    result = _benchmark("benchmarks.benchmark_kernels", report.folder, arguments, "kernels.json")
    report.figure(kernels=result)
    report.check("rows", result["rows"], f"{len(result['rows'])} rows")


def breakdown(report: Report) -> None:
    """Where the time of a prompt goes."""
    settings = report.settings
    arguments = [
        f"--shape={settings['shape']}",
        f"--lengths={_list(settings['lengths'])}",
        f"--repeats={settings['repeats']}",
        f"--trimix={json.dumps(settings['trimix'])}",
        *settings["arguments"],
    ]
    # A rehearsal doesn't need the machine to itself: rows that are refused for that are rows.
    statuses = (0, 1) if report.toy else (0,)
    result = _benchmark("benchmarks.benchmark_breakdown", report.folder, arguments, "breakdown.json", statuses)
    report.figure(breakdown=result)
    due = 2 * len(settings["lengths"])
    report.check("rows", len(result["rows"]) == due, f"{len(result['rows'])} of {due} rows")


def ttft(report: Report) -> None:
    """Time to first token, stock and TRIMIX, and the floor where the device holds three servers."""
    lines = []
    for row in _served(report):
        line = f"{row['stock']['ttft_median_s']:.3f} s -> {row['ttft_median_s']:.3f} s ({row['ratio_to_stock']:.2f})"
        lines.append(f"{row['length']} tokens: {line}")
        if report.cuda and not report.toy:
            report.check(f"faster than stock at {row['length']}", row["ratio_to_stock"] < 1, line)
    if lines:
        report.seen("; ".join(lines))


def decode(report: Report) -> None:
    """Latency between tokens: decode is vLLM's own and must stay as fast."""
    lines = []
    for row in _served(report):
        line = f"{1000 * row['itl_median_s']:.2f} ms, {row['itl_ratio_to_stock']:.3f} of stock's"
        lines.append(f"batch {row['concurrency']}: {line}")
        if report.cuda and not report.toy:
            same = row["itl_ratio_to_stock"] <= report.settings["most"]
            report.check(f"as fast as stock, batch {row['concurrency']}", same, line)
    if lines:
        report.seen("between tokens, " + "; ".join(lines))


def gate(report: Report) -> None:
    """Every row answers a question and counts its rows, before any of them is timed."""
    settings = report.settings
    arguments = [
        f"--shape={settings['shape']}",
        f"--lengths={settings['length']}",
        f"--trimix={json.dumps(settings['trimix'])}",
        f"--rows={settings['rows']}",
        "--gate-only",
        "--no-ideal",
        "--start-timeout=300",
        *(f"--serve-arg={argument}" for argument in ("--dtype=bfloat16", *settings["serve_arguments"])),
    ]
    seen = _benchmark("benchmarks.benchmark_ttft", report.folder, arguments, "gate.json")
    report.figure(gate=seen)
    for name in row_names(settings["rows"]):
        report.check(name, "rows by" in seen.get(name, ""), seen.get(name, "not asked"))
    report.seen(f"{len(seen)} configurations answered and counted their rows")


def rows(report: Report) -> None:
    """Time to first token of dynamic rows, each with its density: figures to read, for the model decides them."""
    lines = []
    names = row_names(report.settings["rows"])
    for row in _served(report):
        for name in names:
            found = row["others"][name]
            line = (
                f"{found['ttft_median_s']:.3f} s ({found['ratio_to_stock']:.2f} of stock), density {found['density']}"
            )
            lines.append(f"{row['length']} tokens, {name}: {line}")
            report.check(f"{name} at {row['length']}: rows were counted", found["density"] is not None, line)
    if lines:
        report.seen("; ".join(lines))


def row_names(rows: str) -> list[str]:
    """The names behind ``--rows``."""
    return list(PUBLISHED_ROWS) if rows == "published" else [name for name in rows.split(",") if name]


def server_bytes(shape: ModelShape, *, kv_tokens: int, kv_element: int) -> tuple[int, int]:
    """Device memory of one server with two-byte weights.

    Args:
        shape: The model.
        kv_tokens: Tokens that the KV cache holds.
        kv_element: Bytes of a KV-cache element.

    Returns:
        Bytes of KV cache, and of everything together.
    """
    kv = 2 * shape.layers * shape.kv_heads * shape.head_dim * kv_element * kv_tokens
    attention = shape.hidden_size * shape.head_dim * 2 * (shape.heads + shape.kv_heads)
    layer = attention + 3 * shape.hidden_size * shape.intermediate_size
    embeddings = (1 if shape.tie_word_embeddings else 2) * shape.vocab_size * shape.hidden_size
    return kv, kv + 2 * (shape.layers * layer + embeddings) + _OVERHEAD


def _served(report: Report) -> list[dict[str, Any]]:
    """Runs ``benchmark_ttft`` into the group's folder.

    Every server gets the same KV cache of a known size: sizes that vLLM finds by profiling would count the memory of
    the servers that start beside it. ``--gpu-memory-utilization`` is then only a check of free memory at start.

    Returns:
        This stage's rows of TRIMIX, each with stock's under ``stock`` and those of named rows under ``others``; none,
        and the stage is skipped, if the device is too small.
    """
    settings = report.settings
    names = row_names(settings["rows"])
    shape, lengths = CIRCUIT if settings["shape"] == "circuit" else SHAPES[settings["shape"]], settings["lengths"]
    least, most = 2 + len(names), 2 + len(names) + settings["ideal"]
    kv_element = 1 if "--kv-cache-dtype=fp8" in settings["serve_arguments"] else 2
    memory = report.environment.get("device_memory_bytes", math.inf)
    for kv_tokens in settings["kv_tokens"]:
        kv, each = server_bytes(shape, kv_tokens=kv_tokens + _KV_SLACK, kv_element=kv_element)
        fit = int(min(most, _USABLE * memory / each))
        if fit >= least:
            break
    if fit < least or max(lengths) > kv_tokens:
        report.skip(f"{least} servers of {each / GIB:.0f} GiB do not fit in {memory / GIB:.0f} GiB")
        return []
    folder = _shared_folder(report, kv)
    arguments = [
        f"--model={bench_model(folder / 'model', settings['shape'], kv_tokens + _KV_SLACK)}",
        f"--lengths={_list(lengths)}",
        f"--concurrency={_list(settings['concurrency'])}",
        f"--repeats={settings['repeats']}",
        f"--decode-tokens={settings['decode_tokens']}",
        f"--trimix={json.dumps(settings['trimix'])}",
        f"--rows={settings['rows']}",
        f"--shallow={json.dumps(settings['shallow'])}",
        f"--prompts={settings['prompts']}",
        "--start-timeout=300",
        "--no-breakdown",
        *([] if fit > least else ["--no-ideal"]),
        *([] if settings["shape"] == "circuit" else ["--serve-arg=--load-format=dummy"]),
        "--serve-arg=--dtype=bfloat16",
        *(f"--serve-arg={argument}" for argument in ("--gpu-memory-utilization=0.05", f"--kv-cache-memory-bytes={kv}")),
        *(f"--serve-arg={argument}" for argument in settings["serve_arguments"]),
    ]
    result = _benchmark("benchmarks.benchmark_ttft", folder, arguments, "result.json")
    loads = {(length, concurrency) for length in lengths for concurrency in settings["concurrency"]}
    rows = [row for row in result["rows"] if (row["length"], row["concurrency"]) in loads]
    report.figure(rows=rows, servers=fit, server_bytes=each, gate=result["gate"], folder=folder.name)
    of = {(row["config"], row["length"], row["concurrency"]): row for row in rows}
    due = {(config, *load) for config in ("stock", "trimix", *names) for load in loads}
    report.check("rows", due <= of.keys(), f"{len(due & of.keys())} of {len(due)} rows; gate: {result['gate']}")
    return [
        {**of["trimix", *load], "stock": of["stock", *load], "others": {name: of[name, *load] for name in names}}
        for load in sorted(loads)
    ]


def _shared_folder(report: Report, kv: int) -> Path:
    """The group's folder for these servers: rounds of other code, machines or settings are in other folders.

    The environment is asked again: a commit made since this run began is a difference to the benchmark.
    """
    keys = ("shape", "trimix", "ideal", "decode_tokens", "serve_arguments", "rows", "shallow", "prompts")
    same = {key: report.settings[key] for key in keys}
    where = {key: value for key, value in environment().items() if key != "date"}
    digest = hashlib.sha256(json.dumps([same, kv, report.source, where], sort_keys=True).encode())
    folder = report.folder.parent / f"{report.settings['group']}-{digest.hexdigest()[:8]}"
    folder.mkdir(exist_ok=True)
    return folder


def bench_model(directory: Path, shape: str, positions: int) -> Path:
    """Writes the shape, with as many positions as the stage asks for; a circuit model has its own."""
    if shape == "circuit":
        # Heavy: it imports torch.
        from vllm_trimix.demo.circuit import make_demo_model

        make_demo_model(directory, _CIRCUIT_SPEC)
        return directory
    make_bench_model(directory, SHAPES[shape])
    file = directory / "config.json"
    config = json.loads(file.read_text())
    config["max_position_embeddings"] = max(config["max_position_embeddings"], positions)
    file.write_text(json.dumps(config, indent=2) + "\n")
    return directory


def _benchmark(module: str, folder: Path, arguments: list[str], result: str, statuses: tuple[int, ...] = (0,)) -> Any:
    """Runs a benchmark into a folder, its output in the stage's log.

    Raises:
        RuntimeError: It ended with another status than ``statuses``.
    """
    command = [sys.executable, "-m", module, f"--output={folder}", *arguments]
    print(" ".join(command), flush=True)
    status = subprocess.run(command, check=False).returncode
    if status not in statuses:
        raise RuntimeError(f"{module}: exit status {status}, see the stage's log")
    return json.loads((folder / result).read_text())


def _list(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))
