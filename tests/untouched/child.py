"""Runs a small engine in this process, and writes down what vLLM was made of: job on stdin, findings in a file."""

from __future__ import annotations

import importlib
import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from tests.untouched import fingerprints

# Loaded in a server's processes besides what an engine loads; `vllm_trimix.backend.compat` patches two of them.
MODULES = (
    "vllm.entrypoints.cli.main",
    "vllm.entrypoints.openai.api_server",
    "vllm.entrypoints.openai.chat_completion.protocol",
    "vllm.entrypoints.openai.completion.protocol",
    "vllm.v1.core.sched.async_scheduler",
    "vllm.v1.core.sched.scheduler",
    "vllm.v1.engine.async_llm",
    "vllm.v1.engine.core",
    "vllm.v1.engine.core_client",
    "vllm.v1.engine.input_processor",
    "vllm.v1.engine.output_processor",
    "vllm.v1.executor.multiproc_executor",
    "vllm.v1.worker.cpu_model_runner",
    "vllm.v1.worker.cpu_worker",
    "vllm.v1.worker.gpu.model_runner",
    "vllm.v1.worker.gpu_model_runner",
)


def engine_objects(llm: Any) -> dict[str, Any]:
    """The live objects on the way of a request, by what they are."""
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    runner = core.model_executor.driver_worker.worker.model_runner
    layers = runner.compilation_config.static_forward_context
    groups = [group for groups in runner.attn_groups for group in groups]
    return {
        "input processor": engine.input_processor,
        "output processor": engine.output_processor,
        "engine core": core,
        "scheduler": core.scheduler,
        "kv cache": core.scheduler.kv_cache_manager,
        "executor": core.model_executor,
        "worker": core.model_executor.driver_worker.worker,
        "runner": runner,
        **{f"layer {name}": layer for name, layer in layers.items()},
        **{f"implementation {name}": layer.impl for name, layer in layers.items()},
        **{f"builder {number}": group.get_metadata_builder() for number, group in enumerate(groups)},
    }


def main() -> None:
    job = json.load(sys.stdin)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    for module in MODULES:
        importlib.import_module(module)
    engine = {"skip_tokenizer_init": True, "enforce_eager": True, "dtype": "float32", **job["engine"]}
    found: dict[str, Any] = {}
    if job["prompts"]:
        from vllm import LLM

        llm = LLM(**engine)
        found["answers"] = answers(llm, job["prompts"])
        found["objects"] = {name: fingerprints.of_instance(item) for name, item in engine_objects(llm).items()}
    else:
        import torch
        from vllm.config import set_current_vllm_config
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.attention.selector import get_attn_backend

        with set_current_vllm_config(EngineArgs(**engine).create_engine_config()):
            get_attn_backend(32, torch.float32, "auto")
    lines = Path("/proc/self/maps").read_text().splitlines()
    found |= {
        "vllm": fingerprints.loaded_vllm(),
        "ours": sorted(name for name in sys.modules if name.split(".", 1)[0] == "vllm_trimix"),
        "modules": sorted(sys.modules),
        "threads": sorted(thread.name for thread in threading.enumerate()),
        "libraries": sorted({Path(line.split()[-1]).name for line in lines if ".so" in line}),
    }
    Path(sys.argv[1]).write_text(json.dumps(found))


def answers(llm: Any, prompts: list[list[int]]) -> list[list[list[float]]]:
    """Greedy answers, token and log-probability."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    return [
        [[token, step[token].logprob] for token, step in zip(answer.token_ids, answer.logprobs, strict=True)]
        for answer in completions
    ]


if __name__ == "__main__":
    main()
