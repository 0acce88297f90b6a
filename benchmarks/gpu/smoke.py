"""Does anything run here at all? The installation, stock vLLM, and TRIMIX in an engine process of its own."""

from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

from benchmarks.gpu.engine import engine_arguments, run
from benchmarks.gpu.report import Report
from benchmarks.gpu.small_model import prompts, save_small_model
from tests.engine.run import both_ways

# Between two runs in bf16 whose batches are cut differently.
_SAME = 0.1
_DOCTOR = "import sys; from vllm_trimix.cli.main import main; sys.exit(main(['doctor']))"
# The engine core is another process, as it is when served; its counters come through the log.
_SPAWNED = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}


def smoke(report: Report) -> None:
    """``vllm-trimix doctor``, then the same prompts for stock and TRIMIX."""
    model = save_small_model(report.folder / "model")
    wave = both_ways(prompts([20, 300, 500]), max_tokens=8)
    engine = {**engine_arguments(report, "bfloat16"), "max_num_batched_tokens": 1024}
    # Most of it is starting: they start side by side.
    with ThreadPoolExecutor() as pool:
        doctor = pool.submit(_doctor)
        stock_run = pool.submit(run, report, "stock", model, [wave], engine=engine, stock=True, env=_SPAWNED)
        mine = run(report, "trimix", model, [wave], engine=engine, env=_SPAWNED, stdout_rows=True)
        stock = stock_run.result()
    _check_doctor(report, doctor.result())
    start = re.search(r"TRIMIX: layers=.*", mine.log)
    report.check("start-up line", start is not None, start[0] if start else "there is none")
    report.check("stock is stock", "TRIMIX" not in stock.log, _backend(stock.log, report))
    first = [abs(a["logprobs"][0] - b["logprobs"][0]) for a, b in zip(mine.waves[0], stock.waves[0], strict=True)]
    apart = max(first[1::2])
    report.check("opted-out answers", apart < _SAME, f"their first log-probabilities are within {apart:.2g} of stock's")
    apart = max(first[::2])
    report.check("triangle answers", apart > _SAME, f"the mask moves a first log-probability by {apart:.2g}")
    report.figure(backend=_backend(stock.log, report), trimix=start[0] if start else None)
    report.seen(f"stock: {_backend(stock.log, report)}; {start[0] if start else ''}")


def _doctor() -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", _DOCTOR], capture_output=True, text=True, check=False)


def _check_doctor(report: Report, found: subprocess.CompletedProcess[str]) -> None:
    lines = [line for line in found.stdout.splitlines() if line.startswith(("ok", "FAILED"))]
    for line in lines:
        mark, name, text = line.split(None, 2)
        report.check(f"doctor: {name}", mark == "ok", text)
    if not lines:
        report.check("doctor", False, (found.stdout + found.stderr)[-1000:])


def _backend(log: str, report: Report) -> str:
    """What vLLM says it chose."""
    if not report.cuda:
        return "CPU_ATTN"
    found = re.findall(r"Using (\w+) (?:attention )?backend|Using (FlashAttention version \d)", log)
    return ", ".join(dict.fromkeys("".join(pair) for pair in found)) or "vLLM names none"
