"""The process that holds an engine for a command: ``python -m`` a module that calls ``serve``, with a descriptor FD.

A job comes as one JSON line on stdin, then one line per message; each is answered by one JSON line on FD. Standard
output and error are vLLM's log. An answer with the key ``error`` says in one line what the user got wrong; anything
else that goes wrong ends the process with a traceback in the log. The end of stdin ends the engine.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import re
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_trimix.backend import compat, settings
from vllm_trimix.backend.engines import cpu_cache
from vllm_trimix.backend.engines.messages import messages
from vllm_trimix.backend.names import NAME, RESOLVED
from vllm_trimix.config.context import derived_length

# A served engine chooses its chunk sizes by this.
CONTEXT = UsageContext.OPENAI_API_SERVER


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, with errors for the caller instead of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        unknown = message.startswith("unrecognized arguments")
        hint = "; engine flags of vllm serve go there, not those of its server" if unknown else ""
        raise ValueError(f"engine flags (after --): {message}{hint}")


def serve(configure: Callable[..., tuple[Any, dict[str, Any]]], answer: Callable[[Any, dict[str, Any]], Any]) -> None:
    """Answers the job with ``ready``, then each message.

    Args:
        configure: Makes the engine's configuration of the job's keys, and what else ``ready`` is answered with.
        answer: Answers one message, given the engine.
    """
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as replies:

        def reply(message: Any) -> None:
            replies.write(json.dumps(message) + "\n")

        asked = messages()
        job = json.loads(next(asked))
        try:
            vllm_config, more = configure(**job)
            cpu_cache.choose(vllm_config, job["flags"])
        except (Exception, SystemExit) as error:
            reply({"error": one_line(error)})
            raise
        engine = LLMEngine.from_vllm_config(vllm_config, usage_context=CONTEXT, disable_log_stats=True)
        reply({"ready": facts(vllm_config), **more})
        for line in asked:
            reply(answer(engine, json.loads(line)))
        engine.engine_core.shutdown()


def reply(answer: Callable[..., dict[str, Any]]) -> None:
    """Answers the job alone, without an engine.

    Args:
        answer: Makes the answer of the job's keys.
    """
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as replies:
        try:
            found = answer(**json.loads(next(messages())))
        except (Exception, SystemExit) as error:
            found = {"error": one_line(error)}
        replies.write(json.dumps(found) + "\n")


def usual_length(arguments: Any) -> int:
    """Tokens that the model is made for, with the engine's flags.

    Raises:
        ValueError: Flags that vLLM doesn't take for this model.
    """
    config = arguments.create_model_config()
    # By itself vLLM keeps LongRoPE models to the length before their stretching.
    stretched = derived_length(config.hf_config) or 0
    own = arguments.max_model_len is not None and arguments.max_model_len >= 0
    longer = not own and stretched > config.max_model_len and takes(arguments, stretched)
    return stretched if longer else int(config.max_model_len)


def takes(arguments: Any, length: int) -> bool:
    """Whether vLLM takes so many tokens of the model when they are asked for."""
    try:
        dataclasses.replace(arguments, max_model_len=length).create_model_config()
    except ValueError:
        return False
    return True


def engine_arguments(model: str, flags: list[str]) -> Any:
    """Parses engine flags as ``vllm serve`` does.

    Raises:
        ValueError: Unknown flags, or flags that the command sets itself.
    """
    parser = AsyncEngineArgs.add_cli_args(_Parser(prog="vllm serve"))
    parsed = parser.parse_args(flags)
    defaults = parser.parse_args([])
    if parsed.model != defaults.model:
        raise ValueError(f"engine flags (after --): --model {parsed.model}: name the model once, as MODEL")
    if parsed.additional_config != defaults.additional_config:
        raise ValueError("engine flags (after --): --additional-config: give its trimix entry by --trimix instead")
    if parsed.data_parallel_size != 1:
        raise ValueError("engine flags (after --): --data-parallel-size: leave it out; one replica is measured")
    backend = parsed.attention_backend
    if backend is not None and getattr(backend, "name", backend) != NAME:
        raise ValueError(f"engine flags (after --): --attention-backend: leave it out; {NAME} is what is measured")
    parsed.model = model
    return EngineArgs.from_cli_args(parsed)


def facts(vllm_config: Any) -> dict[str, Any]:
    """What runs, for a provenance; ``resolved`` is None for stock vLLM, ``hardware`` where it is this machine's CPU."""
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    stock = not isinstance(vllm_config.additional_config, dict) or (RESOLVED not in vllm_config.additional_config)
    resolved = None if stock else settings.of(vllm_config)
    return {
        "resolved": None if resolved is None else resolved.model_dump(mode="json"),
        # Known here, where PyTorch is loaded already.
        "shallow_dense_len": None if resolved is None or resolved.shallow is None else resolved.shallow.dense_len,
        "hardware": None
        if current_platform.is_cpu()
        else f"{parallel.world_size} x {current_platform.get_device_name()}",
        "versions": versions(),
        "engine": {
            "dtype": str(model_config.dtype).removeprefix("torch."),
            "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
            "world_size": parallel.world_size,
            "max_num_batched_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
            "enforce_eager": model_config.enforce_eager,
        },
    }


def versions() -> dict[str, str]:
    """Of everything that decides how fast a kernel is."""
    found = {"python": platform.python_version(), "vllm": compat.vllm_version()}
    for name in ("vllm-trimix", "torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and without pydantic's wrapping."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\d+ validation errors? for \w+ (?:Value error, )?", "", text)
    text = re.sub(r" \[type=.*$", "", text)
    text = text or type(error).__name__
    return text if len(text) <= 500 else text[:500] + " ..."
