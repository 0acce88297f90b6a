"""The engine that ``vllm-trimix calibrate`` measures, in a process of its own: ``python -m`` this module FD.

A job comes as one JSON line on stdin, then one line per request; each is answered by one JSON line on file descriptor
FD. Standard output and error are vLLM's log. A line with the key ``error`` says in one line what the user got wrong;
anything else that goes wrong ends the process with a traceback in the log. The end of stdin ends the engine.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import random
import re
import sys
import time
from typing import Any, NoReturn

from vllm import SamplingParams
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.platforms import current_platform
from vllm.usage.usage_lib import UsageContext
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.engine.llm_engine import LLMEngine

from vllm_trimix.backend import compat, settings
from vllm_trimix.backend.registration import NAME, register_trimix
from vllm_trimix.calibration import LONGEST, SHORTEST, VARIANTS
from vllm_trimix.hardware import cpu_name, cpuinfo

# A served engine chooses its chunk sizes by this.
_CONTEXT = UsageContext.OPENAI_API_SERVER
_LOG_INTERVAL = 0.5


class _Parser(FlexibleArgumentParser):
    """vLLM's parser, with errors for the caller instead of a usage text and an exit."""

    def error(self, message: str) -> NoReturn:
        unknown = message.startswith("unrecognized arguments")
        hint = "; engine flags of vllm serve go there, not those of its server" if unknown else ""
        raise ValueError(f"engine flags (after --): {message}{hint}")


def main() -> None:
    """Answers the job with ``ready``, then each request with its seconds."""
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as replies:

        def reply(answer: dict[str, Any]) -> None:
            replies.write(json.dumps(answer) + "\n")

        job = json.loads(sys.stdin.readline())
        try:
            vllm_config, longest = configure(**job)
        except (Exception, SystemExit) as error:
            reply({"error": one_line(error)})
            raise
        engine = LLMEngine.from_vllm_config(vllm_config, usage_context=_CONTEXT, disable_log_stats=True)
        reply({"ready": facts(vllm_config), "longest": longest})
        vocab_size = vllm_config.model_config.get_vocab_size()
        for line in sys.stdin:
            request = json.loads(line)
            prompt = random_prompt(request["length"], request["seed"], vocab_size)
            reply({"seconds": seconds_to_first_token(engine, prompt, VARIANTS[request["variant"]])})
        engine.engine_core.shutdown()


def configure(*, model: str, flags: list[str], trimix: dict[str, Any], max_length: int | None) -> tuple[Any, int]:
    """Makes the engine's configuration from flags of ``vllm serve``.

    Args:
        model: As ``vllm serve`` takes it.
        flags: Engine flags.
        trimix: The user's ``trimix`` entry.
        max_length: Longest prompt to measure, in tokens; None for what the model can take, up to ``LONGEST``.

    Returns:
        The configuration, and the longest prompt to measure.

    Raises:
        ValueError: Flags that vLLM doesn't know or that calibrate sets itself, a length beyond the model's, or nothing
            that would be sparse.
    """
    register_trimix()
    arguments = engine_arguments(model, flags)
    if arguments.max_model_len is None or arguments.max_model_len < 0:
        # The model's own limit; what the engine then gets is what it needs, so that the KV cache can be small.
        limit, served_limit = arguments.create_model_config().max_model_len, None
    else:
        limit = served_limit = arguments.max_model_len
    longest = min(LONGEST, limit - 1) if max_length is None else max_length
    if longest > limit - 1:
        raise ValueError(
            f"--max-length: {longest} prompt tokens and 1 generated exceed the {limit} tokens of {model}; "
            f"choose at most {limit - 1}"
        )
    if longest < SHORTEST:
        raise ValueError(f"{model}: its {limit} tokens are fewer than the {SHORTEST} of the shortest measured prompt")
    arguments.max_model_len = served_limit or longest + 1
    arguments.attention_backend = NAME
    # A repeated prompt must be computed anew.
    arguments.enable_prefix_caching = False
    entry = {**trimix, "min_prompt_len": 0, "stats_log_interval": _LOG_INTERVAL}
    arguments.additional_config = {settings.ENTRY: entry}
    vllm_config = arguments.create_engine_config(_CONTEXT)
    resolved = settings.of(vllm_config)
    if resolved.shallow is not None:
        # Here and not in the entry: the pattern may come from a preset, which is read only when the model is known.
        shallow = resolved.shallow.model_copy(update={"min_seq_len": 0})
        resolved = resolved.model_copy(update={"shallow": shallow})
        stored = {settings.RESOLVED: resolved.model_dump(mode="json")}
        vllm_config.additional_config = {**vllm_config.additional_config, **stored}
        if longest <= shallow.dense_len:
            raise ValueError(
                f"--max-length: prompts of up to {shallow.dense_len} tokens (last_n and a tile) have no row for "
                f"{shallow.label}; {longest} is too short"
            )
    elif not resolved.layers:
        raise ValueError(
            "trimix.layers: the triangle set is empty, and no shallow pattern; there is nothing to measure"
        )
    if resolved.layers and resolved.triangle.is_dense(longest):
        raise ValueError(
            f"--max-length: up to {resolved.triangle.dense_len} tokens (n_init + n_local + last_n) the pattern hides "
            f"nothing; {longest} is too short"
        )
    return vllm_config, longest


def engine_arguments(model: str, flags: list[str]) -> Any:
    """Parses engine flags as ``vllm serve`` does.

    Raises:
        ValueError: Unknown flags, or flags that calibrate sets itself.
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
    """What ran, for the provenance and for the overlay."""
    model_config, parallel = vllm_config.model_config, vllm_config.parallel_config
    resolved = settings.of(vllm_config)
    return {
        "resolved": resolved.model_dump(mode="json"),
        # Known here, where PyTorch is loaded already.
        "shallow_dense_len": None if resolved.shallow is None else resolved.shallow.dense_len,
        "hardware": hardware(parallel.world_size),
        "versions": versions(),
        "engine": {
            "dtype": str(model_config.dtype).removeprefix("torch."),
            "kv_cache_dtype": str(vllm_config.cache_config.cache_dtype),
            "world_size": parallel.world_size,
            "max_num_batched_tokens": vllm_config.scheduler_config.max_num_batched_tokens,
            "enforce_eager": model_config.enforce_eager,
        },
    }


def hardware(world_size: int) -> str:
    """The devices that compute, in words."""
    if not current_platform.is_cpu():
        return f"{world_size} x {current_platform.get_device_name()}"
    flags = [flag for flag in ("avx512f", "avx512_bf16", "amx_bf16") if re.search(rf"\b{flag}\b", cpuinfo())]
    extensions = f" ({', '.join(flags)})" if flags else ""
    return f"{cpu_name()}{extensions}, {len(os.sched_getaffinity(0))} cores usable"


def versions() -> dict[str, str]:
    """Of everything that decides how fast a kernel is."""
    found = {"python": platform.python_version(), "vllm": compat.vllm_version()}
    for name in ("vllm-trimix", "torch", "triton"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def random_prompt(length: int, seed: int, vocab_size: int) -> list[int]:
    """Token ids from the middle of the vocabulary: special and image tokens are at either end."""
    generator = random.Random(seed)
    return [generator.randrange(vocab_size // 8, vocab_size // 2) for _ in range(length)]


def seconds_to_first_token(engine: Any, prompt: list[int], extra_args: dict[str, str]) -> float:
    """Wall-clock seconds of one request that generates one token, with the engine to itself."""
    params = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True, detokenize=False, extra_args=extra_args)
    start = time.perf_counter()
    engine.add_request(f"calibrate-{time.monotonic_ns()}", {"prompt_token_ids": prompt}, params)
    while True:
        if any(output.finished for output in engine.step()):
            return time.perf_counter() - start


def one_line(error: BaseException) -> str:
    """An error's message without line breaks and without pydantic's wrapping."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\d+ validation errors? for \w+ (?:Value error, )?", "", text)
    text = re.sub(r" \[type=.*$", "", text)
    text = text or type(error).__name__
    return text if len(text) <= 500 else text[:500] + " ..."


if __name__ == "__main__":
    main()
