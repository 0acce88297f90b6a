"""The engine that ``vllm-trimix calibrate`` measures; a message is one request."""

from __future__ import annotations

import random
import time
from typing import Any

from vllm import SamplingParams

from vllm_trimix.backend import settings
from vllm_trimix.backend.engines import cpu_cache
from vllm_trimix.backend.engines.job import CONTEXT, engine_arguments, serve, takes, usual_length
from vllm_trimix.backend.names import ENTRY, NAME, RESOLVED
from vllm_trimix.backend.registration import register_trimix

_LOG_INTERVAL = 0.5


def answer(engine: Any, message: dict[str, Any]) -> dict[str, float]:
    """The seconds of one request: ``length`` in tokens, ``seed`` of its prompt, ``extra_args``."""
    prompt = random_prompt(message["length"], message["seed"], engine.model_config.get_vocab_size())
    return {"seconds": seconds_to_first_token(engine, prompt, message["extra_args"])}


def configure(
    *, model: str, flags: list[str], trimix: dict[str, Any], max_length: int | None, shortest: int, longest: int
) -> tuple[Any, dict[str, int]]:
    """Makes the engine's configuration from flags of ``vllm serve``.

    Args:
        model: As ``vllm serve`` takes it.
        flags: Engine flags.
        trimix: The user's ``trimix`` entry.
        max_length: Longest prompt to measure, in tokens; None for what the model can take, up to ``longest``.
        shortest: Shortest prompt to measure.
        longest: Limit where no ``max_length`` is given.

    Returns:
        The configuration, and the longest prompt to measure as ``longest``.

    Raises:
        ValueError: Flags that vLLM doesn't know or that calibrate sets itself, a length beyond the model's, or nothing
            that would be sparse.
    """
    register_trimix()
    arguments = engine_arguments(model, flags)
    if arguments.max_model_len is None or arguments.max_model_len < 0:
        # The model's own limit; what the engine then gets is what it needs, so that the KV cache can be small.
        limit, served_limit = usual_length(arguments), None
        # What is asked for may be more: vLLM's limit then isn't what it takes by itself.
        if max_length is not None and max_length >= limit and takes(arguments, max_length + 1):
            limit = max_length + 1
    else:
        limit = served_limit = arguments.max_model_len
    fitting = None if max_length is not None else cpu_cache.longest_fitting(arguments, flags)
    if fitting is not None:
        longest = max(min(longest, fitting - 1), shortest)
    longest = min(longest, limit - 1) if max_length is None else max_length
    if longest > limit - 1:
        raise ValueError(
            f"--max-length: {longest} prompt tokens and 1 generated exceed the {limit} tokens of {model}; "
            f"choose at most {limit - 1}"
        )
    if longest < shortest:
        raise ValueError(f"{model}: its {limit} tokens are fewer than the {shortest} of the shortest measured prompt")
    arguments.max_model_len = served_limit or longest + 1
    arguments.attention_backend = NAME
    # A repeated prompt must be computed anew.
    arguments.enable_prefix_caching = False
    entry = {**trimix, "min_prompt_len": 0, "stats_log_interval": _LOG_INTERVAL}
    arguments.additional_config = {ENTRY: entry}
    vllm_config = arguments.create_engine_config(CONTEXT)
    resolved = settings.of(vllm_config)
    if resolved.shallow is not None:
        # Here and not in the entry: the pattern may come from a preset, which is read only when the model is known.
        shallow = resolved.shallow.model_copy(update={"min_seq_len": 0})
        resolved = resolved.model_copy(update={"shallow": shallow})
        stored = {RESOLVED: resolved.model_dump(mode="json")}
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
    return vllm_config, {"longest": longest}


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


if __name__ == "__main__":
    serve(configure, answer)
