"""Processes in place of the served stage's engines, which answer by a script and fail when told."""

from __future__ import annotations

import functools
import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu.report import Report, granted_file, load, save, waiting_file
from benchmarks.gpu.served import stage
from benchmarks.gpu.served.engine import Engine

TOY: dict[str, Any] = {
    "shape": "bench-8l",
    "trimix": {
        "starting_layer": 4,
        "min_prompt_len": 0,
        "n_init": 8,
        "n_local": 64,
        "last_n": 32,
        "shallow": {"pattern": "block_sparse", "top_k": 2, "min_seq_len": 0},
    },
    "chunks": [256, 128],
    "lengths": [512],
    "lengths_of_other_chunks": [512],
    "rounds": 2,
    "stock_length": 512,
    "stock_rounds": 1,
    "decode": {"length": 64, "prompts": 4, "tokens": 8, "repeats": 2},
    "profile": {"length": 512, "step": 1},
    "short": [128],
    "short_repeats": 2,
    "warm_up": 256,
    "cost": [1e-4, 0.0],
    "target_density": 0.11,
    # Many times as fast as bf16 on a CPU without instructions for that.
    "engine": {"enforce_eager": True, "dtype": "float32"},
    "reserve_gib": 0,
    "start_limit": 300,
    "answer_limit": 120,
    "box": 120,
}

# Answers like ``benchmarks.gpu.served.child``, from a script of what to do at which question:
# {"NAME": {"start" | N | MODE: deed}}.
CHILD = """
import json, os, sys, time
answers = os.fdopen(int(sys.argv[-1]), "w", buffering=1)
job = json.loads(sys.stdin.readline())
name = "stock" if job["stock"] else f"trimix_{job['engine']['max_num_batched_tokens']}"
deeds = json.loads(sys.argv[1]).get(name, {})

def do(deed):
    if deed == "die":
        print("(EngineCore) RuntimeError: CUDA error: an illegal memory access was encountered", flush=True)
        os._exit(7)
    if deed == "hang":
        time.sleep(600)
    if deed == "garbage":
        answers.write("half a line of something\\n")
    if deed == "half":
        answers.write('{"ready": 1')
        answers.flush()
        os._exit(3)
    return deed is not None

if not do(deeds.get("start")):
    backends = ["FLASH_ATTN"] if job["stock"] else ["TRIMIX"]
    answers.write(json.dumps({"ready": 1.5, "backends": backends, "chunk": job["engine"]["max_num_batched_tokens"],
                              "kv_tokens": 4096}) + "\\n")
for number, line in enumerate(sys.stdin):
    asked = json.loads(line)
    if do(deeds.get(str(number)) or deeds.get(asked["mode"])):
        continue
    seconds = {"on": 0.25, "triangle": 0.5}.get(asked["mode"], 1.0) * asked["length"] / 512
    rows = {"opt_out": asked["length"]} if asked["mode"] == "off" else {"triangle": asked["length"] - 32}
    rows["triangle_layer_rows"] = 4 * rows.get("triangle", 0)
    if asked["mode"] == "on":
        rows |= {"dynamic_layer_rows": 4 * rows["triangle"], "keys_read": 10, "keys_causal": 100}
    timed = {"ttft_s": seconds, "vllm_ttft_s": seconds, "between_s": [0.02] * 7}
    answers.write(json.dumps({**timed, "rows": rows}) + "\\n")
"""


def child(deeds: dict[str, dict[str, str]] | None = None) -> list[str]:
    """The command of a child that misbehaves as told."""
    return [sys.executable, "-c", CHILD, json.dumps(deeds or {})]


def make_report(tmp_path: Path, **settings: Any) -> Report:
    """A report whose stage is granted the device, for 100 s, as soon as it asks."""
    path = tmp_path / "served.json"
    settings = {"toy": True, "device": "cpu", "group": None, **TOY, **settings}
    common = {"environment": {"device": "cpu"}, "checks": [], "source": ""}
    save(path, {"stage": "served", "status": "running", "settings": settings, **common})

    def grant() -> None:
        while not waiting_file(path).exists():
            time.sleep(0.01)
        granted_file(path).write_text("100")
        waiting_file(path).unlink()

    threading.Thread(target=grant, daemon=True).start()
    return Report(path)


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, deeds: dict[str, dict[str, str]], **settings: Any) -> Any:
    """The stage's result with such children."""
    monkeypatch.setattr(stage, "Engine", functools.partial(Engine, command=child(deeds)))
    stage.served(make_report(tmp_path, **settings))
    return load(tmp_path / "served.json")


def failures(result: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["detail"] for check in result["checks"] if not check["passed"]}
